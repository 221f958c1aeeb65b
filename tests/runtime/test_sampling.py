from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from diffveil.errors import EngineError, OptionError
from diffveil.samplers import SamplerTable, Step, ddim, o_belm
from diffveil.sampling import add_noise, run
from diffveil.schedule import CLEAN, NoiseSchedule

SCHEDULE = NoiseSchedule()
Latent = NDArray[np.float32]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(777)


@pytest.fixture
def x(rng: np.random.Generator) -> Latent:
    return rng.standard_normal((3, 2, 4, 4)).astype(np.float32)


def model(x: Latent, timestep: int) -> Latent:
    return np.asarray(np.tanh(x + np.float32(timestep / 1000)), dtype=np.float32)


def full_table() -> SamplerTable:
    """Rows with every coefficient in use (the first cannot use a prediction from before it)."""
    first = Step(
        timestep=700,
        next_timestep=300,
        a0=0.9,
        a1=0.2,
        b0=-0.4,
        b1=0.0,
        n=0.3,
        g=0.7,
        x0_x=1.1,
        x0_eps=-0.6,
    )
    second = replace(first, timestep=300, next_timestep=100, a0=1.2, a1=-0.1, b1=0.25, g=0.5)
    return SamplerTable("full", 700, (first, second), prev_timestep=900)


def test_every_term_of_a_step(x: Latent, rng: np.random.Generator) -> None:
    before = rng.standard_normal(x.shape).astype(np.float32)
    draws = rng.standard_normal((2, *x.shape)).astype(np.float32)
    table = full_table()

    def gradient(x0: Latent, step: Step) -> Latent:
        assert step in table.steps
        return (x0 * x0).astype(np.float32)

    ours, ours_prev = run(
        table, x, model, x_prev=before, gradient=gradient, noise=lambda index: draws[index]
    )
    one, two = table.steps
    here = [before.astype(np.float64), x.astype(np.float64)]
    eps = [np.tanh(here[1] + 0.7)]
    x0 = one.x0_x * here[1] + one.x0_eps * eps[0]
    here.append(
        one.a0 * here[1] + one.a1 * here[0] + one.b0 * eps[0] + one.n * draws[0] - one.g * x0**2
    )
    eps.append(np.tanh(here[2] + 0.3))
    x0 = two.x0_x * here[2] + two.x0_eps * eps[1]
    expected = two.a0 * here[2] + two.a1 * here[1] + two.b0 * eps[1] + two.b1 * eps[0]
    expected += two.n * draws[1] - two.g * x0**2
    # A handful of float32 roundings of numbers below 10.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-6)
    np.testing.assert_allclose(ours_prev, here[2], rtol=0, atol=5e-6)
    assert ours.dtype == ours_prev.dtype == np.float32


def test_a_step_is_rounded_to_float32_once(x: Latent, rng: np.random.Generator) -> None:
    before = rng.standard_normal(x.shape).astype(np.float32)
    table = o_belm(SCHEDULE, 2)
    ours, _ = run(table, x, model, x_prev=before)
    (step,) = table.steps
    total = step.a0 * x.astype(np.float64) + step.a1 * before.astype(np.float64)
    total += step.b0 * model(x, step.timestep).astype(np.float64)
    np.testing.assert_array_equal(ours, total.astype(np.float32))


def test_input_is_left_alone(x: Latent) -> None:
    before = x.copy()
    run(ddim(SCHEDULE, 4), x, model)
    np.testing.assert_array_equal(x, before)


def test_rows_do_not_depend_on_the_batch(x: Latent) -> None:
    table = ddim(SCHEDULE, 6)
    whole, _ = run(table, x, model)
    for order in ([0], [2], [2, 0], [1, 2, 0]):
        part, _ = run(table, x[order], model)
        np.testing.assert_array_equal(part, whole[order])


def test_denoiser_sees_the_tables_timesteps(x: Latent) -> None:
    table, seen = ddim(SCHEDULE, 50, 0.6), []

    def spy(x: Latent, timestep: int) -> Latent:
        seen.append(timestep)
        assert x.dtype == np.float32
        return model(x, timestep)

    run(table, x, spy)
    assert tuple(seen) == table.timesteps == tuple(range(581, 0, -20))


def test_gradient_is_asked_for_only_where_it_counts(x: Latent) -> None:
    table = ddim(SCHEDULE, 6).guided(lambda index, timestep: 0.5 if index in (1, 4) else 0.0)
    asked: list[int] = []

    def gradient(x0: Latent, step: Step) -> Latent:
        asked.append(step.timestep)
        return np.ones_like(x0)

    guided, _ = run(table, x, model, gradient=gradient)
    assert asked == [table.timesteps[1], table.timesteps[4]]
    plain, _ = run(ddim(SCHEDULE, 6), x, model)
    assert np.abs(guided - plain).max() > 0.1


def test_blend_replaces_what_a_step_arrives_at(x: Latent) -> None:
    kept, arrived = np.full_like(x, 0.25), []

    def blend(x: Latent, step: Step) -> Latent:
        arrived.append(step.next_timestep)
        left = np.arange(x.shape[-1]) < 2
        return np.where(left, kept, x).astype(np.float32)

    out, _ = run(ddim(SCHEDULE, 4), x, model, blend=blend)
    assert arrived == [501, 251, 1, CLEAN]
    np.testing.assert_array_equal(out[..., :2], kept[..., :2])
    assert not np.array_equal(out[..., 2:], kept[..., 2:])


def test_progress_counts_to_the_end(x: Latent) -> None:
    calls: list[tuple[int, int]] = []
    run(ddim(SCHEDULE, 3), x, model, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_what_a_table_needs_is_never_left_out_silently(x: Latent) -> None:
    guided = ddim(SCHEDULE, 3).guided(lambda index, timestep: 1.0)
    with pytest.raises(OptionError, match="gradient is missing"):
        run(guided, x, model)
    with pytest.raises(OptionError, match="noise is missing"):
        run(ddim(SCHEDULE, 3, eta=1.0), x, model)
    with pytest.raises(OptionError, match="x_prev is missing"):
        run(o_belm(SCHEDULE, 3), x, model)
    with pytest.raises(OptionError, match="x_prev is given"):
        run(ddim(SCHEDULE, 3), x, model, x_prev=x)
    with pytest.raises(OptionError, match=r"x_prev has shape \[1, 2, 4, 4\]"):
        run(o_belm(SCHEDULE, 3), x, model, x_prev=x[:1])
    with pytest.raises(
        OptionError, match=r"x_prev is missing;.*gradient is missing;.*noise is missing"
    ):
        run(full_table(), x, model)
    history = replace(ddim(SCHEDULE, 1).steps[0], b1=0.5)
    with pytest.raises(OptionError, match="prediction from before"):
        run(SamplerTable("history", 1, (history,)), x, model)


def test_wrong_shapes_are_named(x: Latent) -> None:
    table = ddim(SCHEDULE, 2).guided(lambda index, timestep: 1.0)
    with pytest.raises(EngineError, match=r"denoise returned shape \[1, 2, 4, 4\] at timestep 501"):
        run(table, x, lambda x, t: x[:1], gradient=lambda x0, step: x0)
    with pytest.raises(EngineError, match="gradient returned shape"):
        run(table, x, model, gradient=lambda x0, step: x0[..., :1])
    with pytest.raises(EngineError, match="blend returned shape"):
        run(ddim(SCHEDULE, 2), x, model, blend=lambda x, step: x[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_latent_that_overflows_is_an_error(x: Latent, value: float) -> None:
    def broken(x: Latent, timestep: int) -> Latent:
        return np.where(timestep < 500, np.float32(value), model(x, timestep))

    with pytest.raises(EngineError, match="not finite after timestep 251"):
        run(ddim(SCHEDULE, 4), x, broken)


def test_add_noise_has_the_level_of_the_timestep(rng: np.random.Generator) -> None:
    clean, gaussian = rng.standard_normal((2, 2, 3, 4, 4)).astype(np.float32)
    noisy = add_noise(SCHEDULE, clean, gaussian, 601)
    expected = np.sqrt(SCHEDULE.alphas_cumprod[601]) * clean
    expected = expected + np.sqrt(1 - SCHEDULE.alphas_cumprod[601]) * gaussian
    np.testing.assert_allclose(noisy, expected, rtol=0, atol=1e-6)
    assert noisy.dtype == np.float32
    with pytest.raises(OptionError, match="timestep is 1000"):
        add_noise(SCHEDULE, clean, gaussian, 1000)
