"""Tables beside diffusers' schedulers, where it has one for the same sampler and timesteps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, TCDScheduler
from diffusers.schedulers import scheduling_lcm, scheduling_tcd

from diffveil.samplers import SamplerTable, ddim, dpm_solver, lcm, tcd
from diffveil.sampling import run
from diffveil.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()
COMMON: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SHAPE = (2, 4, 6, 5)


def predict(x: Any, timestep: int) -> Any:
    """The same smooth noise prediction for arrays and tensors."""
    tanh = torch.tanh if isinstance(x, torch.Tensor) else np.tanh
    return 0.4 * x + 0.5 * tanh(x * 1.5 + timestep / 500)


def diffuse(scheduler: Any, timesteps: list[int], x: np.ndarray) -> np.ndarray:
    """Run a diffusers scheduler in float64; its noise comes from the patched generator."""
    scheduler.set_timesteps(timesteps=timesteps)
    latent = torch.from_numpy(x.astype(np.float64))
    for t in scheduler.timesteps:
        latent = scheduler.step(predict(latent, int(t)), t, latent, return_dict=False)[0]
    return latent.numpy()


def ours(table: SamplerTable, x: np.ndarray, fresh: np.ndarray | None = None) -> np.ndarray:
    def model(latent: Any, timestep: int) -> Any:
        return predict(latent, timestep).astype(np.float32)

    noise = None if fresh is None else (lambda index: fresh[index])
    return run(table, x, model, noise=noise)[0]


def close(got: np.ndarray, expected: np.ndarray, table: SamplerTable) -> None:
    # One rounding to float32 a step, which 1/α magnifies at the noisiest node; diffusers keeps its
    # noise levels in float32.
    bound = 40 * np.finfo(np.float32).eps * len(table.steps) / SCHEDULE.signal(table.timesteps[0])
    assert np.abs(got - expected).max() <= bound * max(1.0, np.abs(expected).max())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("strength", [0.4, 0.65])
@pytest.mark.parametrize("steps", [6, 12, 40])
def test_dpm_solver(steps: int, strength: float) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **COMMON, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="sigma_min"
    )
    table = dpm_solver(SCHEDULE, steps, strength)
    x = np.random.default_rng(steps).standard_normal(SHAPE).astype(np.float32)
    close(ours(table, x), diffuse(scheduler, list(table.timesteps), x), table)


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize(
    ("make", "kind", "module"),
    [(lcm, LCMScheduler, scheduling_lcm), (tcd, TCDScheduler, scheduling_tcd)],
)
def test_consistency_samplers(
    make: Any, kind: Any, module: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(steps)
    x = rng.standard_normal(SHAPE).astype(np.float32)
    fresh = rng.standard_normal((steps, *SHAPE)).astype(np.float32)
    drawn = iter(fresh)
    monkeypatch.setattr(
        module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(drawn).astype(np.float64))
    )
    table = make(SCHEDULE, steps, 0.7)
    scheduler = kind(**COMMON, set_alpha_to_one=False)
    timesteps = list(table.timesteps)
    close(ours(table, x, fresh), diffuse(scheduler, timesteps, x), table)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim(steps: int) -> None:
    scheduler = DDIMScheduler(**COMMON, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    table = ddim(SCHEDULE, steps)
    assert tuple(scheduler.timesteps.tolist()) == table.timesteps
    x = np.random.default_rng(steps).standard_normal(SHAPE).astype(np.float32)
    latent = torch.from_numpy(x.astype(np.float64))
    for t in scheduler.timesteps:
        latent = scheduler.step(predict(latent, int(t)), t, latent, return_dict=False)[0]
    close(ours(table, x), latent.numpy(), table)
