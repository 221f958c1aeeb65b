"""DPM-Solver++(2M), LCM, TCD, BDIA and the timestep spacings, each against its paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.runtime.test_samplers import GaussianModel, crooked

from diffveil.errors import OptionError
from diffveil.samplers import (
    SPACINGS,
    SamplerTable,
    Spacing,
    bdia,
    bdia_inversion,
    ddim,
    dpm_solver,
    lcm,
    tcd,
)
from diffveil.samplers.nodes import spaced_timesteps
from diffveil.sampling import run
from diffveil.schedule import CLEAN, NoiseSchedule

SCHEDULE = NoiseSchedule()
EPS32 = float(np.finfo(np.float32).eps)
SHAPE = (2, 3, 5, 4)
Make = Callable[..., SamplerTable]

_F64 = NDArray[np.float64]


def levels(timestep: int) -> tuple[float, float]:
    return SCHEDULE.signal(timestep), SCHEDULE.noise(timestep)


def draw(seed: int) -> tuple[NDArray[np.float32], Callable[[int], NDArray[np.float32]]]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(SHAPE).astype(np.float32)
    fresh = rng.standard_normal((60, *SHAPE)).astype(np.float32)
    return x, lambda index: fresh[index]


def clean(x: _F64, timestep: int) -> tuple[_F64, _F64]:
    """x̂0 and ε of the crooked model, which is asked in float32 as the loop asks it."""
    alpha, sigma = levels(timestep)
    epsilon = crooked(x.astype(np.float32), timestep).astype(np.float64)
    return (x - sigma * epsilon) / alpha, epsilon


def paper_dpm(table: SamplerTable, x: _F64, fresh: Any) -> _F64:
    """Algorithm 2 of arXiv 2211.01095, with λ and the data prediction as it states them."""
    nodes = [*table.timesteps, CLEAN]
    lam = [math.log(a / s) for a, s in map(levels, nodes)]
    before = None
    for i in range(1, len(nodes)):
        x0, _ = clean(x, nodes[i - 1])
        direction = x0
        h = lam[i] - lam[i - 1]
        final = i == len(nodes) - 1 and len(table.timesteps) < 15
        if before is not None and not final and h != 0.0:
            r = (lam[i - 1] - lam[i - 2]) / h
            direction = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        (alpha, sigma), (_, sigma_back) = levels(nodes[i]), levels(nodes[i - 1])
        x = sigma / sigma_back * x - alpha * math.expm1(-h) * direction
        before = x0
    return x


def paper_lcm(table: SamplerTable, x: _F64, fresh: Any) -> _F64:
    """Algorithm 3 of arXiv 2310.04378."""
    nodes = [*table.timesteps, CLEAN]
    for i, (here, there) in enumerate(pairwise(nodes)):
        x0, _ = clean(x, here)
        skip = 0.5**2 / ((10 * here) ** 2 + 0.5**2)
        out = 10 * here / math.sqrt((10 * here) ** 2 + 0.5**2)
        x0 = skip * x + out * x0
        if there == CLEAN:
            return x0
        alpha, sigma = levels(there)
        x = alpha * x0 + sigma * fresh(i)
    raise AssertionError


def paper_tcd(table: SamplerTable, x: _F64, fresh: Any, gamma: float = 0.3) -> _F64:
    """Algorithm 4 of arXiv 2402.19159."""
    nodes = [*table.timesteps, CLEAN]
    for i, (here, there) in enumerate(pairwise(nodes)):
        x0, epsilon = clean(x, here)
        lower = there if there == CLEAN else int((1 - gamma) * there)
        alpha, sigma = levels(lower)
        x = alpha * x0 + sigma * epsilon
        share = (levels(there)[0] / alpha) ** 2
        if share < 1:
            x = math.sqrt(share) * x + math.sqrt(1 - share) * fresh(i)
    return x


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
@pytest.mark.parametrize("strength", [0.3, 0.65, 0.99])
@pytest.mark.parametrize(
    ("make", "oracle"), [(dpm_solver, paper_dpm), (lcm, paper_lcm), (tcd, paper_tcd)]
)
def test_tables_do_what_their_papers_write(
    make: Make, oracle: Any, spacing: Spacing, steps: int, strength: float
) -> None:
    if spacing == "leading" and steps == 1:
        pytest.skip("its only timestep is 1, from which there is nothing to denoise")
    table = make(SCHEDULE, steps, strength, spacing=spacing)
    x, fresh = draw(steps)
    got, _ = run(table, x, crooked, noise=fresh)
    expected = oracle(table, x.astype(np.float64), fresh)
    # The loop rounds the latent to float32 once a step; the model passes that on, and high noise
    # levels magnify it by 1/α.
    magnified = 1 / levels(table.timesteps[0])[0]
    scale = float(np.abs(expected).max())
    assert np.abs(got - expected).max() <= 30 * EPS32 * scale * magnified * len(table.steps)


@pytest.mark.parametrize("spacing", ["trailing", "karras", "ays"])
@given(n=st.integers(1, 60), end=st.integers(60, 1000))
@settings(max_examples=60, deadline=None)
def test_spacings_are_distinct_and_include_the_highest(spacing: Spacing, n: int, end: int) -> None:
    timesteps = spaced_timesteps(SCHEDULE, n, end, spacing)
    assert len(timesteps) == n
    assert timesteps[-1] == end - 1
    assert timesteps[0] >= 0
    assert all(a < b for a, b in pairwise(timesteps))


def test_aligned_steps_are_the_published_ones() -> None:
    published = (24, 124, 233, 343, 455, 545, 645, 736, 850, 999)
    assert spaced_timesteps(SCHEDULE, 10, 1000, "ays") == published


def test_karras_spacing_is_even_in_the_seventh_root_of_the_noise_level() -> None:
    timesteps = spaced_timesteps(SCHEDULE, 8, 1000, "karras")
    ratio = [SCHEDULE.noise(t) / SCHEDULE.signal(t) for t in timesteps]
    gaps = np.diff(np.array(ratio) ** (1 / 7))
    # Rounding to whole timesteps moves a node by half the distance to its neighbours.
    assert gaps.max() / gaps.min() < 1.1


@pytest.mark.parametrize("make", [dpm_solver, lcm, tcd])
@pytest.mark.parametrize(
    ("steps", "strength"), [(0, 0.5), (-1, 0.5), (2000, 1.0), (10, 0.0), (10, 1.1)]
)
def test_wrong_numbers_are_refused(make: Make, steps: int, strength: float) -> None:
    with pytest.raises(OptionError):
        make(SCHEDULE, steps, strength)


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(OptionError, match="gamma"):
        tcd(SCHEDULE, 4, gamma=1.5)
    with pytest.raises(OptionError, match="gamma"):
        bdia(SCHEDULE, 4, gamma=0.0)
    with pytest.raises(OptionError, match="spacing"):
        spaced_timesteps(SCHEDULE, 4, 900, "even")  # type: ignore[arg-type]


def ode_error(make: Make, steps: int, **options: Any) -> float:
    """Distance of a table's end from the exact flow of the Gaussian model, in float64."""
    model = GaussianModel()
    rng = np.random.default_rng(3)
    x = rng.standard_normal(64)
    table = make(SCHEDULE, steps, 0.9, **options)
    start = x.copy()
    # The loop of `run`, not rounded: the order of convergence shows far below float32.
    x_prev, eps_prev = x, np.zeros_like(x)
    for step in table.steps:
        eps = model(x, step.timestep)
        after = step.a0 * x + step.a1 * x_prev + step.b0 * eps + step.b1 * eps_prev
        x_prev, x, eps_prev = x, after, eps
    exact = model.flow(start, table.start_timestep, CLEAN)
    return float(np.abs(x - exact).max())


@pytest.mark.parametrize(
    ("make", "order", "options"),
    [
        (ddim, 1.0, {"spacing": "trailing"}),
        (dpm_solver, 2.0, {"spacing": "karras"}),
        (tcd, 1.0, {"gamma": 0.0}),
    ],
)
def test_order_of_convergence_on_a_gaussian(
    make: Make, order: float, options: dict[str, Any]
) -> None:
    coarse, fine = (ode_error(make, n, **options) for n in (20, 80))
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.45)


def test_second_order_beats_first_at_equal_cost() -> None:
    first = ode_error(ddim, 20, spacing="karras")
    assert ode_error(dpm_solver, 20, spacing="karras") < 0.3 * first


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_consistency_sampling_keeps_the_distribution(steps: int) -> None:
    """With a perfect consistency model of a Gaussian, any number of steps samples that Gaussian."""
    exact = GaussianModel()

    def model(x: NDArray[Any], timestep: int) -> NDArray[np.float32]:
        alpha, sigma = levels(timestep)
        end = exact.flow(x, timestep, CLEAN) / levels(CLEAN)[0]
        return np.asarray((x - alpha * end) / sigma, dtype=np.float32)

    rng = np.random.default_rng(5)
    table = lcm(SCHEDULE, steps, 0.9)
    alpha, sigma = levels(table.start_timestep)
    data = exact.mean + exact.spread * rng.standard_normal((1, 1, 200, 200))
    x = (alpha * data + sigma * rng.standard_normal(data.shape)).astype(np.float32)
    out, _ = run(table, x, model, noise=lambda _: rng.standard_normal(x.shape).astype(np.float32))
    # The standard error of mean and spread of 40,000 samples is .003 and .002.
    assert float(out.mean()) == pytest.approx(exact.mean, abs=0.012)
    assert float(out.std()) == pytest.approx(exact.spread, abs=0.01)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("steps", [2, 3, 8, 20, 50])
def test_bdia_round_trip_is_exact(steps: int, gamma: float) -> None:
    x, _ = draw(steps)
    forward = bdia_inversion(SCHEDULE, steps, gamma=gamma)
    back = bdia(SCHEDULE, steps, gamma=gamma)
    noisiest, before = run(forward, x, crooked)
    out, _ = run(back, before, crooked, x_prev=noisiest)
    # One float32 rounding a step; γ below one multiplies it by 1/γ at each step of the way up.
    growth = (1 / gamma) ** steps if gamma < 1 else steps
    scale = max(float(np.abs(noisiest).max()), 1.0)
    assert np.abs(out - x).max() <= 60 * EPS32 * scale * steps * growth
    assert len(forward.steps) == steps
    assert len(back.steps) == steps - 1


def test_bdia_is_equation_twenty() -> None:
    """The update as the paper writes it, with increments of DDIM steps."""
    table = bdia(SCHEDULE, 5, gamma=0.7)
    rng = np.random.default_rng(0)
    x_back, x, eps = rng.standard_normal((3, 100))
    nodes = [table.prev_timestep or 0, *table.timesteps, table.end_timestep]

    def increment(here: int, there: int) -> _F64:
        (alpha, sigma), (alpha_to, sigma_to) = levels(here), levels(there)
        moved: _F64 = alpha_to * (x - sigma * eps) / alpha + sigma_to * eps - x
        return moved

    for i, step in enumerate(table.steps):
        back, here, there = nodes[i : i + 3]
        expected = 0.7 * x_back + 0.3 * x - 0.7 * increment(here, back) + increment(here, there)
        got = step.a0 * x + step.a1 * x_back + step.b0 * eps
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
