"""LCM and TCD: stochastic samplers of consistency-distilled models, for a handful of steps."""

from __future__ import annotations

import math
from itertools import pairwise

from diffveil.errors import OptionError
from diffveil.samplers.nodes import Spacing, partial_timesteps
from diffveil.samplers.table import SamplerTable, Step
from diffveil.schedule import CLEAN, NoiseSchedule

__all__ = ["lcm", "tcd"]

_DATA_SPREAD = 0.5  # σ_data of the boundary condition
_TIMESTEP_SCALE = 10.0


def lcm(
    schedule: NoiseSchedule, steps: int, strength: float = 1.0, *, spacing: Spacing = "trailing"
) -> SamplerTable:
    """Multistep consistency sampling: predict the clean latent, noise it again, lower each time.

    Luo et al., "Latent Consistency Models", arXiv 2310.04378, algorithm 3 without guidance; the
    consistency function is c_skip(t) x + c_out(t) x̂0 with their boundary condition (section 4).

    Args:
        schedule: Noise schedule of the model.
        steps: Number of steps that strength 1 would make.
        strength: How much noise to start from, in (0, 1].
        spacing: Which timesteps to visit.

    Raises:
        OptionError: An argument is out of range.
    """
    timesteps, start = partial_timesteps(schedule, steps, strength, spacing)
    rows = []
    for here, there in pairwise((*reversed(timesteps), CLEAN)):
        alpha, sigma = schedule.signal(here), schedule.noise(here)
        scaled = here * _TIMESTEP_SCALE
        square = scaled * scaled + _DATA_SPREAD * _DATA_SPREAD
        skip, out = _DATA_SPREAD * _DATA_SPREAD / square, scaled / math.sqrt(square)
        x0_x, x0_eps = skip + out / alpha, -out * sigma / alpha
        # The last prediction is the result itself.
        last = there == CLEAN
        kept = 1.0 if last else schedule.signal(there)
        rows.append(
            Step(
                timestep=here,
                next_timestep=there,
                a0=kept * x0_x,
                a1=0.0,
                b0=kept * x0_eps,
                b1=0.0,
                n=0.0 if last else schedule.noise(there),
                g=0.0,
                x0_x=x0_x,
                x0_eps=x0_eps,
            )
        )
    return SamplerTable("lcm", start, tuple(rows))


def tcd(
    schedule: NoiseSchedule,
    steps: int,
    strength: float = 1.0,
    *,
    spacing: Spacing = "trailing",
    gamma: float = 0.3,
) -> SamplerTable:
    """Strategic stochastic sampling: go further down than the next node, then noise up to it.

    Zheng et al., "Trajectory Consistency Distillation", arXiv 2402.19159, algorithm 4: from t to
    s = ⌊(1 − γ) t_next⌋ along the predicted trajectory, then by diffusion from s to t_next.

    Args:
        schedule: Noise schedule of the model.
        steps: Number of steps that strength 1 would make.
        strength: How much noise to start from, in (0, 1].
        spacing: Which timesteps to visit.
        gamma: γ in [0, 1]: 0 is deterministic, 1 noises every prediction from the clean end.

    Raises:
        OptionError: An argument is out of range.
    """
    if not 0.0 <= gamma <= 1.0:
        raise OptionError(f"gamma is {gamma}, expected 0 to 1")
    timesteps, start = partial_timesteps(schedule, steps, strength, spacing)
    rows = []
    for here, there in pairwise((*reversed(timesteps), CLEAN)):
        alpha, sigma = schedule.signal(here), schedule.noise(here)
        lower = CLEAN if there == CLEAN else math.floor((1.0 - gamma) * there)
        # Diffusion from `lower` to `there` keeps this share of the signal, and adds the rest.
        share = schedule.signal(there) / schedule.signal(lower)
        signal, noise = schedule.signal(lower) * share, schedule.noise(lower) * share
        rows.append(
            Step(
                timestep=here,
                next_timestep=there,
                a0=signal / alpha,
                a1=0.0,
                b0=noise - signal * sigma / alpha,
                b1=0.0,
                n=math.sqrt(max(0.0, 1.0 - share * share)),
                g=0.0,
                x0_x=1.0 / alpha,
                x0_eps=-sigma / alpha,
            )
        )
    return SamplerTable("tcd", start, tuple(rows))
