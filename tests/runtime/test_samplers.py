from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from diffveil.errors import OptionError
from diffveil.samplers import (
    SamplerTable,
    Spacing,
    Step,
    ddim,
    ddim_inversion,
    o_belm,
    o_belm_inversion,
    retrace,
)
from diffveil.sampling import run
from diffveil.schedule import CLEAN, NoiseSchedule

SCHEDULE = NoiseSchedule()
EPS32 = float(np.finfo(np.float32).eps)


class GaussianModel:
    """Exact noise prediction for data distributed as N(mean, spread²), and its exact ODE solution.

    With σ̄ = σ/α, dx̄/dσ̄ = ε = σ̄ (x̄ − mean) / (spread² + σ̄²) is solved by
    x̄ − mean ∝ sqrt(spread² + σ̄²).
    """

    mean, spread = 0.3, 0.6

    def __call__(self, x: NDArray[Any], timestep: int) -> NDArray[Any]:
        alpha, sigma = SCHEDULE.signal(timestep), SCHEDULE.noise(timestep)
        variance = (alpha * self.spread) ** 2 + sigma**2
        return (sigma * (x - alpha * self.mean) / variance).astype(x.dtype)

    def flow(self, x: NDArray[Any], here: int, there: int) -> NDArray[Any]:
        (alpha, bar), (alpha_to, bar_to) = (
            (SCHEDULE.signal(t), SCHEDULE.noise(t) / SCHEDULE.signal(t)) for t in (here, there)
        )
        growth = math.sqrt((self.spread**2 + bar_to**2) / (self.spread**2 + bar**2))
        return alpha_to * (self.mean + (x / alpha - self.mean) * growth)


def crooked(x: NDArray[np.float32], timestep: int) -> NDArray[np.float32]:
    """A smooth nonlinear model that mixes neighbours and depends on the timestep."""
    mixed = np.roll(x, 1, axis=-1) - 0.5 * np.roll(x, 1, axis=1)
    smooth = 0.3 * np.tanh(mixed + np.float32(math.sin(timestep)))
    return np.asarray(GaussianModel()(x, timestep) + smooth, dtype=np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20230905)


def diffusers_scheduler(name: str, **options: Any) -> Any:
    """A diffusers scheduler computing with our float64 schedule, so that only formulas differ."""
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler = getattr(diffusers, name)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **options,
    )
    scheduler.alphas_cumprod = torch.from_numpy(SCHEDULE.alphas_cumprod.copy())
    for name in ("final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, scheduler.alphas_cumprod[0])
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("steps", "spacing"), [(10, "leading"), (50, "leading"), (30, "leading"), (20, "trailing")]
)
def test_ddim_is_that_of_diffusers(
    steps: int, spacing: Spacing, eta: float, rng: np.random.Generator
) -> None:
    torch = pytest.importorskip("torch")
    scheduler = diffusers_scheduler("DDIMScheduler", timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    table = ddim(SCHEDULE, steps, spacing=spacing, eta=eta)
    assert table.timesteps == tuple(scheduler.timesteps.tolist())
    assert table.end_timestep == CLEAN
    for step in table.steps:
        x, eps, fresh = rng.standard_normal((3, 5))
        theirs = scheduler.step(
            torch.from_numpy(eps),
            step.timestep,
            torch.from_numpy(x),
            eta=eta,
            variance_noise=torch.from_numpy(fresh),
        )
        ours = step.a0 * x + step.b0 * eps + step.n * fresh
        np.testing.assert_allclose(ours, theirs.prev_sample.numpy(), rtol=1e-11, atol=1e-12)
        x0 = step.x0_x * x + step.x0_eps * eps
        np.testing.assert_allclose(x0, theirs.pred_original_sample.numpy(), rtol=1e-11)


@pytest.mark.parametrize("steps", [10, 100])
def test_ddim_inversion_is_that_of_diffusers(steps: int, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    scheduler = diffusers_scheduler("DDIMInverseScheduler", timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    table = ddim_inversion(SCHEDULE, steps)
    assert table.timesteps == tuple(scheduler.timesteps.tolist())
    assert table.start_timestep == CLEAN
    for step in table.steps:
        x, eps = rng.standard_normal((2, 5))
        theirs = scheduler.step(torch.from_numpy(eps), step.timestep, torch.from_numpy(x))
        ours = step.a0 * x + step.b0 * eps
        np.testing.assert_allclose(ours, theirs.prev_sample.numpy(), rtol=1e-11, atol=1e-12)
        assert step.next_timestep == step.timestep


def test_ddim_follows_the_published_method() -> None:
    anonymize = ddim(SCHEDULE, 50, 0.6)
    assert anonymize.start_timestep == 601
    assert anonymize.timesteps == tuple(range(581, 0, -20))
    hide = ddim(SCHEDULE, 100, 0.8)
    assert hide.start_timestep == 801
    assert hide.timesteps == tuple(range(791, 0, -10))
    # 0.29 · 100 is 28.999… as a float.
    assert len(ddim(SCHEDULE, 100, 0.29).steps) == 29
    assert ddim(SCHEDULE, 50).start_timestep == ddim(SCHEDULE, 50).timesteps[0] == 981


def test_trailing_ddim_starts_where_it_evaluates() -> None:
    table = ddim(SCHEDULE, 10, 0.6, spacing="trailing")
    assert table.timesteps == (599, 499, 399, 299, 199, 99)
    assert table.start_timestep == 599
    assert [s.next_timestep for s in table.steps] == [499, 399, 299, 199, 99, CLEAN]


@given(
    steps=st.integers(1, 999),
    strength=st.floats(0.001, 1.0),
    spacing=st.sampled_from(["leading", "trailing"]),
)
@settings(deadline=None)  # the machine may be busy
def test_ddim_tables_are_sound(steps: int, strength: float, spacing: Spacing) -> None:
    table = ddim(SCHEDULE, steps, strength, spacing=spacing)
    assert abs(len(table.steps) - max(1.0, steps * strength)) <= 1.0
    nodes = [table.start_timestep, *(s.next_timestep for s in table.steps)]
    assert nodes[1:] == sorted(set(nodes[1:]), reverse=True)
    assert nodes[0] >= table.timesteps[0] > nodes[1]
    assert table.end_timestep == CLEAN
    assert not table.needs_pair


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (0, {}),
        (1000, {}),
        (10, {"strength": 0.0}),
        (10, {"strength": 1.1}),
        (10, {"strength": math.nan}),
        (10, {"eta": -0.1}),
        (10, {"spacing": "random"}),
    ],
)
def test_ddim_refuses_bad_options(steps: int, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ddim(SCHEDULE, steps, **options)


@pytest.mark.parametrize("steps", [-1, 0, 1, 999])
def test_o_belm_refuses_bad_steps(steps: int) -> None:
    for make in (o_belm, o_belm_inversion):
        with pytest.raises(OptionError, match=f"o-belm steps is {steps}"):
            make(SCHEDULE, steps)


def test_predicted_clean_latent_is_exact_for_the_true_noise(rng: np.random.Generator) -> None:
    clean, gaussian = rng.standard_normal((2, 7))
    for table in (ddim(SCHEDULE, 10, spacing="trailing"), o_belm(SCHEDULE, 10)):
        for step in table.steps:
            noisy = (
                SCHEDULE.signal(step.timestep) * clean + SCHEDULE.noise(step.timestep) * gaussian
            )
            predicted = step.x0_x * noisy + step.x0_eps * gaussian
            # x̂0 is a difference of terms of size 1/α.
            np.testing.assert_allclose(predicted, clean, rtol=1e-12, atol=1e-13 * step.x0_x)


@pytest.mark.parametrize("steps", [2, 5, 8, 50])
def test_o_belm_is_exact_for_quadratic_trajectories(steps: int, rng: np.random.Generator) -> None:
    """Second order means: a trajectory x̄(σ̄) of degree 2 is followed without error."""
    c0, c1, c2 = rng.standard_normal((3, 6))

    def bar(t: int) -> float:
        return SCHEDULE.noise(t) / SCHEDULE.signal(t)

    def x(t: int) -> NDArray[np.float64]:
        return np.asarray(SCHEDULE.signal(t) * (c0 + c1 * bar(t) + c2 * bar(t) ** 2))

    table = o_belm(SCHEDULE, steps)
    assert table.prev_timestep is not None
    back, here = table.prev_timestep, table.start_timestep
    for step in table.steps:
        slope = c1 + 2.0 * c2 * bar(here)
        arrived = step.a0 * x(here) + step.a1 * x(back) + step.b0 * slope
        np.testing.assert_allclose(arrived, x(step.next_timestep), rtol=1e-10, atol=1e-11)
        back, here = here, step.next_timestep


def test_order_of_convergence(rng: np.random.Generator) -> None:
    """Halving the steps' length halves DDIM's error and quarters O-BELM's."""
    model = GaussianModel()
    x = rng.standard_normal(16)

    def follow(table: SamplerTable, x: NDArray[Any], x_prev: NDArray[Any]) -> NDArray[Any]:
        # Not ``run``: its rounding to float32 would hide the error of many steps.
        for s in table.steps:
            x, x_prev = s.a0 * x + s.a1 * x_prev + s.b0 * model(x, s.timestep), x
        return x

    errors: dict[str, list[float]] = {"ddim": [], "o-belm": []}
    for steps in (25, 50, 100, 200):
        table = ddim(SCHEDULE, steps, spacing="trailing")
        error = follow(table, x, x) - model.flow(x, table.start_timestep, CLEAN)
        errors["ddim"].append(float(np.abs(error).max()))
        table = o_belm(SCHEDULE, steps)
        assert table.prev_timestep is not None
        start = model.flow(x, table.prev_timestep, table.start_timestep)
        error = follow(table, start, x) - model.flow(x, table.prev_timestep, table.end_timestep)
        errors["o-belm"].append(float(np.abs(error).max()))
    orders = {name: np.log2(np.divide(e[:-1], e[1:])) for name, e in errors.items()}
    assert orders["ddim"][-1] == pytest.approx(1.0, abs=0.2)
    assert orders["o-belm"][-1] == pytest.approx(2.0, abs=0.3)
    assert errors["o-belm"][-1] < 0.1 * errors["ddim"][-1]


@given(
    steps=st.integers(2, 50),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.1, 3.0),
)
@settings(max_examples=40, deadline=None)
def test_o_belm_round_trip_is_exact_to_rounding(
    steps: int, batch: int, seed: int, scale: float
) -> None:
    x0 = np.random.default_rng(seed).standard_normal((batch, 2, 3, 3)) * scale
    latent = x0.astype(np.float32)
    largest = float(np.abs(latent).max())

    def model(x: NDArray[np.float32], timestep: int) -> NDArray[np.float32]:
        nonlocal largest
        largest = max(largest, float(np.abs(x).max()))
        return crooked(x, timestep)

    x, x_prev = run(o_belm_inversion(SCHEDULE, steps), latent, model)
    back, _ = run(o_belm(SCHEDULE, steps), x_prev, model, x_prev=x)
    # Half a unit of rounding a step and direction, of numbers up to ``largest``; steps towards the
    # clean end do not amplify it.
    np.testing.assert_allclose(back, latent, rtol=0, atol=steps * EPS32 * max(1.0, largest))


def test_ddim_round_trip_is_not_exact(rng: np.random.Generator) -> None:
    """The round-trip test can fail: DDIM's inversion fails it by orders of magnitude."""
    latent = rng.standard_normal((2, 2, 3, 3)).astype(np.float32)
    x, _ = run(ddim_inversion(SCHEDULE, 8), latent, crooked)
    back, _ = run(ddim(SCHEDULE, 8), x, crooked)
    assert np.abs(back - latent).max() > 1000 * EPS32


def test_o_belm_costs_at_most_one_evaluation_a_step() -> None:
    inversion, recovery = o_belm_inversion(SCHEDULE, 8), o_belm(SCHEDULE, 8)
    assert inversion.timesteps == (1, 126, 251, 375, 500, 625, 750, 874)
    assert recovery.timesteps == inversion.timesteps[:0:-1]
    assert (inversion.start_timestep, inversion.end_timestep) == (1, 999)
    assert (recovery.prev_timestep, recovery.start_timestep) == (999, 874)
    assert recovery.end_timestep == 1
    assert recovery.needs_pair
    assert not inversion.needs_pair


@pytest.mark.parametrize("steps", [2, 3, 8, 50])
def test_inverse_of_the_inversion_is_the_sampler(steps: int) -> None:
    ours, again = o_belm(SCHEDULE, steps), o_belm_inversion(SCHEDULE, steps).inverse()
    assert (again.name, again.start_timestep, again.prev_timestep) == (
        ours.name,
        ours.start_timestep,
        ours.prev_timestep,
    )
    for a, b in zip(ours.steps, again.steps, strict=True):
        assert (a.timestep, a.next_timestep) == (b.timestep, b.next_timestep)
        assert (a.a0, a.a1, a.b0) == pytest.approx((b.a0, b.a1, b.b0), rel=1e-13, abs=1e-14)


def test_only_exactly_invertible_tables_have_an_inverse() -> None:
    for table in (ddim(SCHEDULE, 5), ddim(SCHEDULE, 1), ddim_inversion(SCHEDULE, 5)):
        with pytest.raises(OptionError, match="not exactly invertible"):
            table.inverse()
    with pytest.raises(OptionError, match="not exactly invertible"):
        o_belm(SCHEDULE, 5).guided(lambda index, timestep: 0.1).inverse()


def test_guided_fills_the_weights_and_nothing_else() -> None:
    table = ddim(SCHEDULE, 5)
    guided = table.guided(lambda index, timestep: index + timestep / 1000)
    assert [s.g for s in guided.steps] == [i + t / 1000 for i, t in enumerate(table.timesteps)]
    assert guided.guided(lambda index, timestep: 0.0) == table


def test_tables_know_what_they_start_from() -> None:
    step = Step(timestep=5, next_timestep=1, a0=1, a1=0.5, b0=0, b1=0, n=0, g=0, x0_x=1, x0_eps=0)
    with pytest.raises(OptionError, match="prev_timestep is None"):
        SamplerTable("own", 5, (step,))
    with pytest.raises(OptionError, match="no steps"):
        SamplerTable("own", 5, ())


def test_retracing_visits_the_nodes_of_its_table_and_undoes_it() -> None:
    x = np.random.default_rng(7).standard_normal((2, 3, 4, 4)).astype(np.float32)
    errors = []
    for steps in (20, 200):
        table = ddim(SCHEDULE, steps, 0.6, spacing="trailing")
        up = retrace(SCHEDULE, table)
        assert up.timesteps == tuple(reversed(table.timesteps))
        assert (up.start_timestep, up.end_timestep) == (CLEAN, table.start_timestep)
        noisy, _ = run(up, x, crooked)
        back, _ = run(table, noisy, crooked)
        errors.append(float(np.abs(back - x).max()))
    # Of first order in the step length: ten times the steps, a tenth of the error.
    assert errors[1] < 0.2 * errors[0] < 0.2


def test_retracing_needs_a_table_that_starts_where_it_visits() -> None:
    with pytest.raises(OptionError, match="starts at timestep"):
        retrace(SCHEDULE, ddim(SCHEDULE, 50, 0.6, spacing="leading"))
