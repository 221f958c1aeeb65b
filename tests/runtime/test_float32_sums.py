"""What summing a sampler's step in float32 costs exactly invertible tables (ADR 25)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diffveil.plans import Inversion
from diffveil.samplers import SamplerTable
from diffveil.sampling import run
from diffveil.schedule import NoiseSchedule

F32 = NDArray[np.float32]
Pair = tuple[F32, F32]


class Smooth:
    """A stand-in for the network: smooth, bounded, and of unit slope."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._mix = (rng.standard_normal((16, 16)) / 4).astype(np.float32)

    def __call__(self, x: F32, timestep: int, /) -> F32:
        mixed = np.einsum("kc,bchw->bkhw", self._mix, x)
        return np.tanh(mixed + timestep / 1000).astype(np.float32)


def in_float64(table: SamplerTable, predict: Smooth, x: F32, x_prev: F32 | None = None) -> Pair:
    return run(table, x, predict, x_prev=x_prev)


def in_float32(table: SamplerTable, predict: Smooth, x: F32, x_prev: F32 | None = None) -> Pair:
    """As program `advance` sums."""
    x_prev = x if x_prev is None else x_prev
    before = np.zeros_like(x)
    for step in table.steps:
        epsilon = predict(x, step.timestep)
        a0, a1, b0, b1, *_ = np.array(step.coefficients, np.float32)
        total: F32 = a0 * x + a1 * x_prev + b0 * epsilon + b1 * before
        x_prev, x, before = x, total, epsilon
    return x, x_prev


@pytest.mark.parametrize("sampler", ["o-belm", "bdia"])
@pytest.mark.parametrize("steps", [8, 9, 21, 50])
def test_few_bits_are_lost(sampler: Any, steps: int, rng: np.random.Generator) -> None:
    inversion, schedule, predict = Inversion(sampler, steps), NoiseSchedule(), Smooth(rng)
    x = rng.standard_normal((3, 16, 16, 16)).astype(np.float32)

    def error(there: Any, back: Any) -> float:
        noisy, before = there(inversion.forward(schedule), predict, x)
        # The way back enters the pair from its other end.
        clean, _ = back(inversion.recovery(schedule), predict, before, noisy)
        return float(np.abs(clean - x).max())

    exact = error(in_float64, in_float64)
    others = [
        error(there, back)
        for there, back in (
            (in_float32, in_float32),
            (in_float32, in_float64),
            (in_float64, in_float32),
        )
    ]
    assert max(others) < 8 * exact
    assert max(others) < 1e-4
