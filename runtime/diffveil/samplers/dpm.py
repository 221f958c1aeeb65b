"""DPM-Solver++(2M): second order at one evaluation a step."""

from __future__ import annotations

import math
from itertools import pairwise

from diffveil.samplers.ddim import ddim_step
from diffveil.samplers.nodes import Spacing, partial_timesteps
from diffveil.samplers.table import SamplerTable, Step
from diffveil.schedule import CLEAN, NoiseSchedule

__all__ = ["dpm_solver"]

# With fewer evaluations than this the last step is first order: extrapolating over the last, by far
# longest interval of log-SNR loses more than it gains (Lu et al., arXiv 2211.01095, section 5).
_FEW = 15


def dpm_solver(
    schedule: NoiseSchedule, steps: int, strength: float = 1.0, *, spacing: Spacing = "trailing"
) -> SamplerTable:
    """DPM-Solver++(2M) from a partly noised latent to a clean one.

    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    arXiv 2211.01095, algorithm 2. With λ = log(α/σ), h_i = λ_i − λ_{i-1} and r = h_{i-1}/h_i,

        x_i = (σ_i/σ_{i-1}) x_{i-1} − α_i (e^{−h_i} − 1) ((1 + 1/2r) x̂0_{i-1} − 1/2r · x̂0_{i-2}).

    x̂0_{i-2} is linear in the latent and prediction of the step before, hence a1 and b1. The first
    step is of first order, which is DDIM.

    Args:
        schedule: Noise schedule of the model.
        steps: Number of steps that strength 1 would make.
        strength: How much noise to start from, in (0, 1].
        spacing: Which timesteps to visit.

    Raises:
        OptionError: An argument is out of range.
    """
    timesteps, start = partial_timesteps(schedule, steps, strength, spacing)
    nodes = (*reversed(timesteps), CLEAN)
    rows = []
    for i, (here, there) in enumerate(pairwise(nodes)):
        last = i == len(timesteps) - 1
        # A step between equal noise levels (timestep 0 to the clean end) has nothing to solve.
        still = schedule.noise(here) == schedule.noise(there)
        if i == 0 or still or (last and len(timesteps) < _FEW):
            rows.append(ddim_step(schedule, here, there, label=here))
        else:
            rows.append(_second_order(schedule, nodes[i - 1], here, there))
    return SamplerTable("dpm++2m", start, tuple(rows))


def _second_order(schedule: NoiseSchedule, back: int, here: int, there: int) -> Step:
    (alpha_back, sigma_back), (alpha, sigma), (alpha_next, sigma_next) = (
        (schedule.signal(t), schedule.noise(t)) for t in (back, here, there)
    )
    log_snr_back, log_snr, log_snr_next = (
        math.log(a / s)
        for a, s in ((alpha_back, sigma_back), (alpha, sigma), (alpha_next, sigma_next))
    )
    h = log_snr_next - log_snr
    half = 0.5 * h / (log_snr - log_snr_back)
    toward = -alpha_next * math.expm1(-h)
    now, before = toward * (1.0 + half), -toward * half
    return Step(
        timestep=here,
        next_timestep=there,
        a0=sigma_next / sigma + now / alpha,
        a1=before / alpha_back,
        b0=-now * sigma / alpha,
        b1=-before * sigma_back / alpha_back,
        n=0.0,
        g=0.0,
        x0_x=1.0 / alpha,
        x0_eps=-sigma / alpha,
    )
