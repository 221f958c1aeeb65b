"""Whole loops that fail: the next backend begins anew, and nothing of the failed one is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from diffveil.bundle import Bundle
from diffveil.engines import (
    Array,
    Backend,
    BackendWarning,
    Engine,
    MemoryBudget,
    ONNXRuntimeCPU,
    Programs,
)
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.presets import PRESETS
from diffveil.programs import LOOP_PROGRAMS
from fake_machine import Machine, crops
from looping_cpu import LoopingCPU

_PLAIN = PRESETS["fast"].hide.fitting(has_few=False, has_surrogates=False)
_HIDE = replace(_PLAIN, steps=4, guidance=replace(_PLAIN.guidance, margin=None), redraws=0)


def hidden(programs: Programs) -> NDArray[np.float32]:
    images = crops(np.random.default_rng(3), 1)
    return FaceOperations(programs).hide(images, _HIDE, keys=[NoiseKey.from_seed(0)])


@pytest.fixture(scope="module")
def expected(looped: Bundle) -> NDArray[np.float32]:
    with Programs(looped, ONNXRuntimeCPU(threads=1)) as programs:
        return hidden(programs)


def test_a_loop_that_fails_begins_anew_on_the_next_backend(looped: Bundle, expected: Array) -> None:
    class Broken(LoopingCPU):
        name = "broken"

        def load(self, bundle: Bundle, program: str) -> Engine:
            engine = super().load(bundle, program)
            if program == "advance":
                engine._session = None  # type: ignore[attr-defined]
            return engine

    with (
        Programs(looped, Broken(threads=1), others=[ONNXRuntimeCPU(threads=1)]) as programs,
        pytest.warns(BackendWarning, match="'broken' failed and 'cpu' runs instead"),
    ):
        ours = hidden(programs)
    np.testing.assert_array_equal(ours, expected)


def bound(program: str) -> Backend:
    return LoopingCPU(threads=1, spoilt=frozenset({program}))


def native(program: str) -> Backend:
    machine = Machine()
    machine.trt.spoilt.add(program)
    return machine.backend


@pytest.mark.parametrize("backend", [bound, native])
@pytest.mark.parametrize("program", ["predict", "steer", "advance"])
def test_what_is_not_finite_within_a_loop_falls_back_once(
    program: str, backend: Callable[[str], Backend], looped: Bundle, expected: Array
) -> None:
    """Nothing is looked at before the loop's result: NaN must not be lost on the way there."""
    cpu = ONNXRuntimeCPU(threads=1)
    with Programs(looped, backend(program), others=[cpu]) as programs:
        with pytest.warns(BackendWarning, match="the latent is not finite") as caught:
            ours = hidden(programs)
        assert len(caught) == 1
        assert programs.backend is cpu
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.filterwarnings("error::diffveil.BackendWarning")
def test_other_calls_do_not_unload_what_a_loop_needs(looped: Bundle, expected: Array) -> None:
    """With little memory another thread's calls make room between the loading and the loop."""

    class Interrupted(Programs):
        def engine(self, program: str) -> Engine:
            engine = super().engine(program)
            self._pool.engine("embed")
            self._pool.engine("decode")
            return engine

    backend = LoopingCPU(threads=1)
    names = ("denoise", "guide", *LOOP_PROGRAMS)
    budget = MemoryBudget(looped, MemoryBudget(looped, 0, 1).need(names), 1)
    with Interrupted(looped, backend, others=[ONNXRuntimeCPU(1)], budget=budget) as programs:
        ours = hidden(programs)
        assert programs.backend is backend
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
