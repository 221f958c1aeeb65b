"""The curves benchmark: what it tries, how it judges, and that it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import curves
from benchmarks.curves import choices, worst

from diffveil.presets import PRESETS
from diffveil.schedule import NoiseSchedule


def test_every_choice_is_a_plan_of_its_own() -> None:
    all_choices = list(choices(brief=False))
    names = [(c.operation, c.family, c.name) for c in all_choices]
    assert len(names) == len(set(names))
    for choice in all_choices:
        table = choice.plan.table(NoiseSchedule())
        guided = any(step.g for step in table.steps)
        assert guided or choice.name == "none"
        assert (
            choice.plan.guidance.mode == {"anonymize": "repel", "hide": "attract"}[choice.operation]
        )
    counts = {
        c.name: len(c.plan.table(NoiseSchedule()).steps)
        for c in all_choices
        if c.family in ("ddim", "dpm++2m", "lcm", "tcd")
    }
    assert all(count == int(name.split()[-1]) for name, count in counts.items())


def test_brief_means_the_presets() -> None:
    assert len(list(choices(brief=True))) == 2 * len(PRESETS)


def row(same: float, other: float, independent: bool) -> dict[str, Any]:
    return {"same_photo": same, "other_photos": other, "independent": independent}


def test_independent_recognizers_judge_where_there_are_some() -> None:
    record = {"a": row(0.5, 0.9, False), "b": row(0.1, 0.2, True), "c": row(0.05, 0.3, True)}
    assert worst(record, "anonymize") == 0.3
    assert worst(record, "hide") == 0.05
    assert worst({"a": record["a"]}, "hide") == 0.5


def test_it_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    points = [
        {
            "name": choice.name,
            "family": choice.family,
            "operation": choice.operation,
            "milliseconds": float(rng.uniform(50, 900)),
            "worst": float(rng.random()),
        }
        for choice in choices(brief=False)
    ]
    recovery = [
        {"sampler": s, "evaluations": n, "loss_db": 1 / n}
        for s in ("o-belm", "bdia", "ddim")
        for n in (2, 8)
    ]
    curves.draw({"points": points, "recovery": recovery}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
