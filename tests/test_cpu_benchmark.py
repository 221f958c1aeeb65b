"""The CPU benchmark: its plans, its verdicts and its tables."""

from __future__ import annotations

import time
from dataclasses import asdict, replace

import pytest
from benchmarks._cpu_loops import plan_of
from benchmarks.cpu import Timing, _verdict, as_markdown, option_ways, take_turns

from diffveil.schedule import NoiseSchedule

SAME = Timing("same", 1.0, 1.0, 1.0, (0.9, 1.05), 1.0, (0.97, 1.02), 9)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_plans_make_the_steps_that_were_asked_for(steps: int) -> None:
    plan = plan_of(steps)
    table = plan.table(NoiseSchedule())
    assert len(table.steps) == steps
    assert plan.guidance.repeats == 1
    assert all(step.g for step in table.steps)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match="no plan"):
        plan_of(999)


def test_turns_are_counted_and_compared() -> None:
    calls: list[str] = []

    def way(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    ways = {
        "first": lambda: way("first", 0.001),
        "again": lambda: way("again", 0.001),
        "slow": lambda: way("slow", 0.02),
    }
    first, _, slow = take_turns(ways, 0.0)
    assert (first.ratio, first.turns) == (1.0, 5)
    assert slow.ratio > 2
    assert len(calls) == 3 * 6
    # The order rotates, after one call each to warm up.
    assert calls[3:9] == ["first", "again", "slow", "again", "slow", "first"]


@pytest.mark.parametrize(
    ("quartiles", "cpu", "verdict"),
    [
        ((0.7, 0.8), (0.7, 0.8), "faster"),
        ((0.7, 0.95), (0.7, 0.8), "as fast"),  # within what the same way does
        ((0.7, 0.8), (0.9, 0.98), "as fast"),
        ((1.2, 1.4), (1.1, 1.2), "slower"),
        ((1.2, 1.4), (0.9, 1.2), "as fast"),
    ],
)
def test_noise_is_no_gain(
    quartiles: tuple[float, float], cpu: tuple[float, float], verdict: str
) -> None:
    timing = replace(SAME, quartiles=quartiles, cpu_quartiles=cpu)
    assert _verdict(timing, SAME) == verdict


def test_options_start_from_the_runtimes_own() -> None:
    first, again, *others = option_ways(2).values()
    assert first.options().enable_mem_pattern is again.options().enable_mem_pattern is True
    assert len(others) == 8
    assert option_ways(1).keys() < option_ways(2).keys()
    assert any(other.options().enable_cpu_mem_arena for other in others)


def test_tables_are_tables() -> None:
    row = asdict(SAME)
    report = {
        **{"bundle": "b", "machine": "m", "threads": 2, "versions": {"p": "1"}, "command": "c"},
        "programs": [
            {"program": "denoise", "ms_1": 1, "cpu_ms_1": 2, "ms_8": 3, "cpu_ms_8": 4},
        ],
        "options": [{"program": "denoise", **row}],
        "loops": [{"steps": 2, "faces": 1, "max_difference": 0.0, **row}],
    }
    widths = {block[0].count("|") for block in _tables(as_markdown(report))}
    assert all(len({line.count("|") for line in t}) == 1 for t in _tables(as_markdown(report)))
    assert widths == {6, 8, 10}


def _tables(text: str) -> list[list[str]]:
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [block for block in blocks if block[0].startswith("|")]
