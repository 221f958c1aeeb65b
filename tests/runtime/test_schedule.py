from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffveil.errors import OptionError
from diffveil.schedule import (
    CLEAN,
    NoiseSchedule,
    ddim_timesteps,
    stage_of,
    trailing_timesteps,
    uniform_nodes,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "schedule.txt"


def golden_records() -> list[tuple[int, float]]:
    records = GOLDEN.read_text(encoding="utf-8").split("\n\n")[1:]
    pairs = (dict(line.split(": ") for line in record.strip().split("\n")) for record in records)
    return [(int(pair["timestep"]), float(pair["expect"])) for pair in pairs]


@pytest.mark.parametrize(("timestep", "expected"), golden_records())
def test_alphas_cumprod_is_golden(timestep: int, expected: float) -> None:
    # One rounding of half a unit for each of up to 1000 factors and as many products.
    tolerance = 2 * (timestep + 1) * np.finfo(np.float64).eps
    assert NoiseSchedule().alphas_cumprod[timestep] == pytest.approx(expected, rel=tolerance)


def test_golden_file_is_not_empty() -> None:
    assert len(golden_records()) == 12


def test_alphas_cumprod_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    ours = NoiseSchedule().alphas_cumprod
    # diffusers multiplies a thousand factors in float32.
    np.testing.assert_allclose(ours, scheduler.alphas_cumprod.numpy(), rtol=1000 * 2.0**-23)


def test_alphas_cumprod_cannot_be_changed() -> None:
    schedule = NoiseSchedule()
    assert schedule.alphas_cumprod is schedule.alphas_cumprod
    assert schedule.alphas_cumprod.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.0


@given(st.integers(CLEAN, 999))
@settings(deadline=None)  # the machine may be busy
def test_signal_and_noise_make_unit_variance(timestep: int) -> None:
    schedule = NoiseSchedule()
    assert math.hypot(schedule.signal(timestep), schedule.noise(timestep)) == pytest.approx(1.0)


def test_clean_end_has_the_level_of_timestep_0() -> None:
    schedule = NoiseSchedule()
    assert schedule.signal(CLEAN) == schedule.signal(0) == math.sqrt(0.99915)
    assert schedule.noise(CLEAN) == schedule.noise(0)
    assert schedule.noise(CLEAN) < schedule.noise(1) < schedule.noise(999)


@pytest.mark.parametrize("timestep", [-2, 1000])
def test_no_level_outside_the_schedule(timestep: int) -> None:
    with pytest.raises(OptionError, match=f"timestep is {timestep}"):
        NoiseSchedule().signal(timestep)
    with pytest.raises(OptionError, match=f"timestep is {timestep}"):
        NoiseSchedule().noise(timestep)


def test_schedule_reports_every_problem() -> None:
    with pytest.raises(OptionError, match=r"steps is 1.*beta_start is 0\.5"):
        NoiseSchedule(steps=1, beta_start=0.5, beta_end=0.1)


def test_stages_cover_the_timesteps_evenly() -> None:
    stages = [stage_of(t) for t in range(1000)]
    assert stages == [i for i in range(10) for _ in range(100)]
    for timestep in (-1, 1000):
        with pytest.raises(OptionError, match="timestep is"):
            stage_of(timestep)


def test_ddim_timesteps() -> None:
    assert ddim_timesteps(50) == tuple(range(1, 982, 20))
    assert ddim_timesteps(100)[80] == 801
    assert ddim_timesteps(3, offset=0) == (0, 333, 666)
    assert ddim_timesteps(1) == (1,)


@pytest.mark.parametrize(
    ("n", "offset"), [(0, 1), (1000, 1), (1001, 0), (-5, 1), (4, 250), (4, -1)]
)
def test_ddim_timesteps_refuses_what_does_not_fit(n: int, offset: int) -> None:
    with pytest.raises(OptionError):
        ddim_timesteps(n, offset)


def test_trailing_timesteps() -> None:
    assert trailing_timesteps(3, 600) == (199, 399, 599)
    assert trailing_timesteps(4) == (249, 499, 749, 999)
    assert trailing_timesteps(5, 5) == (0, 1, 2, 3, 4)
    for n in (0, 6):
        with pytest.raises(OptionError, match=f"steps is {n}"):
            trailing_timesteps(n, 5)


@given(st.integers(2, 999))
@settings(deadline=None)  # the machine may be busy
def test_uniform_nodes_are_even_and_keep_both_ends(n: int) -> None:
    nodes = uniform_nodes(n)
    assert len(nodes) == n
    assert (nodes[0], nodes[-1]) == (1, 999)
    gaps = np.diff(nodes)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("arguments", [(1,), (1000,), (2, 5, 5), (2, -1, 5)])
def test_uniform_nodes_refuses_what_does_not_fit(arguments: tuple[int, ...]) -> None:
    with pytest.raises(OptionError):
        uniform_nodes(*arguments)
