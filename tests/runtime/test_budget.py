"""A memory limit: fewer faces a call, programs unloaded between phases, the same results."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffveil import Protector
from diffveil.bundle import Bundle
from diffveil.engines import Backend, Engine, MemoryBudget, ONNXRuntimeCPU, Programs, parse_memory
from diffveil.errors import OptionError
from diffveil.presets import PRESETS
from fake_photos import ListedDetector
from fake_programs import fake_bundle
from faulty_backends import FaultyBackend


class _Counting(FaultyBackend):
    """Holds every load against the budget."""

    def __init__(self, inner: Backend, budget: MemoryBudget) -> None:
        super().__init__(inner, "counting")
        self.budget, self.held, self.most = budget, [], 0  # type: list[str], int

    def load(self, bundle: Bundle, program: str) -> Engine:
        engine = super().load(bundle, program)
        self.held.append(program)
        assert self.budget.fits(self.held), self.held
        self.most = max(self.most, len(self.held))
        close = engine.close

        def closing() -> None:
            self.held.remove(program)
            close()

        engine.close = closing  # type: ignore[method-assign]
        return engine


def smallest(bundle: Bundle) -> int:
    """Bytes with which one face just fits."""
    low, high = 1, 1 << 40
    while low < high:
        middle = (low + high) // 2
        try:
            MemoryBudget.plan(bundle, middle, 32)
            high = middle
        except OptionError:
            low = middle + 1
    return low


def test_more_memory_never_means_fewer_faces(tiny_bundle: Bundle) -> None:
    least = smallest(tiny_bundle)
    rows = [MemoryBudget.plan(tiny_bundle, least * k // 4, 32).rows for k in range(4, 80, 4)]
    assert rows[0] == 1
    assert rows == sorted(rows)
    assert MemoryBudget.plan(tiny_bundle, 1 << 40, 32).rows == 32
    with pytest.raises(OptionError, match=r"denoise and guide of bundle 'tiny' need about \d+"):
        MemoryBudget.plan(tiny_bundle, least - 1, 32)


_PLAIN = PRESETS["balanced"].anonymize.fitting(has_few=False, has_surrogates=False)
ONE_DRAW = replace(PRESETS["balanced"], anonymize=replace(_PLAIN, redraws=0))
"""Each draw is a loop of its own, which loads its programs anew."""


def test_programs_are_unloaded_between_phases_and_results_stay(
    tiny_bundle: Bundle, rng: np.random.Generator
) -> None:
    cpu = ONNXRuntimeCPU(1)
    budget = MemoryBudget.plan(tiny_bundle, smallest(tiny_bundle), 32)
    counting = _Counting(cpu, budget)
    photo = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with Programs(tiny_bundle, counting, budget=budget) as limited:
        protector = Protector(limited, detector=ListedDetector({}))
        assert protector.operations.max_batch == budget.rows == 1
        first = protector.anonymize([photo, photo[::-1]], aligned=True, seed=3, preset=ONE_DRAW)
        assert counting.most < len(tiny_bundle.manifest.programs)
        assert len(counting.loaded) > len(set(counting.loaded))  # the next phase needed them again
        # What takes turns in the loop stays: one load of each for all steps.
        assert counting.loaded.count("guide") == 1
        back = protector.recover(first[0].image, first[0].key)  # type: ignore[arg-type]
    assert counting.held == []
    with Programs(tiny_bundle, cpu) as programs:
        free = Protector(programs, detector=ListedDetector({}))
        expected = free.anonymize([photo, photo[::-1]], aligned=True, seed=3, preset=ONE_DRAW)
        for one, other in zip(first, expected, strict=True):
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=1)
        other_back = free.recover(expected[0].image, expected[0].key)  # type: ignore[arg-type]
    difference = np.abs(np.asarray(back).astype(int) - np.asarray(other_back).astype(int))
    assert difference.max() <= 2


def test_what_is_held_is_not_unloaded_for_others(tiny_bundle: Bundle) -> None:
    """As another thread's calls would while a loop runs."""
    budget = MemoryBudget.plan(tiny_bundle, smallest(tiny_bundle), 32)
    with Programs(tiny_bundle, ONNXRuntimeCPU(1), budget=budget) as programs:
        with programs.held(["denoise", "not in the bundle"]):
            engine = programs.engine("denoise")
            programs.preload(["guide", "decode"])
            assert programs.engine("denoise") is engine
        programs.preload(["guide", "decode"])
        assert "denoise" not in programs._pool._loaded


def test_enough_memory_unloads_nothing(tiny_bundle: Bundle, rng: np.random.Generator) -> None:
    with Protector.load(tiny_bundle, backend="cpu", max_memory="4 GiB") as protector:
        assert protector.programs.max_batch == 32
        photo = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        protector.anonymize(photo, aligned=True, seed=1)
        assert len(protector.programs._pool._loaded) >= 6


def test_a_limit_that_is_too_small_is_refused_at_once(tiny_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="for one face"):
        Protector.load(tiny_bundle, max_memory=1000)


def test_bundles_without_counts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not state the cost of encode"):
        MemoryBudget.plan(fake_bundle(tmp_path / "bundle"), 1 << 30, 32)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(5, 5), ("5", 5), ("2K", 2048), ("1.5GiB", 3 << 29), ("800 MB", 800 << 20), ("1g", 1 << 30)],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_memory(size) == expected


@pytest.mark.parametrize(
    "size", ["", "GiB", "-1G", "1TiB", "1e9", "0", 0, -4, True, "nan", "1..5M"]
)
def test_no_sizes(size: int | str) -> None:
    with pytest.raises(OptionError, match="max_memory: received"):
        parse_memory(size)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_an_option_error(text: str) -> None:
    with suppress(OptionError):
        assert parse_memory(text) >= 1
