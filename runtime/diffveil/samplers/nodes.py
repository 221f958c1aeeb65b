"""Which timesteps a sampler visits."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from diffveil.errors import OptionError
from diffveil.schedule import NoiseSchedule, ddim_timesteps, trailing_timesteps

__all__ = ["SPACINGS", "Spacing", "partial_timesteps", "spaced_timesteps"]

Spacing = Literal["leading", "trailing", "karras", "ays"]
"""How timesteps are spread; see `spaced_timesteps`, and `diffveil.samplers.ddim` for "leading"."""

SPACINGS: tuple[Spacing, ...] = get_args(Spacing)

_RHO = 7.0
# Sabour et al., "Align Your Steps", arXiv 2404.14507: the ten steps optimised for Stable Diffusion
# 1.5. For other numbers of steps the paper interpolates the noise levels log-linearly.
_ALIGNED = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)


def partial_timesteps(
    schedule: NoiseSchedule, steps: int, strength: float, spacing: Spacing
) -> tuple[tuple[int, ...], int]:
    """Timesteps of a run from a partly noised latent, and where it starts.

    Args:
        schedule: Noise schedule of the model.
        steps: Number of steps that strength 1 would make.
        strength: How much noise to start from, in (0, 1].
        spacing: See `spaced_timesteps`. ``"leading"`` visits the lowest ⌊steps · strength⌋ of
            ``steps`` uniform timesteps and starts one index above them; all others visit
            round(steps · strength) and start at the highest.

    Returns:
        Ascending timesteps, at least one, and the timestep of the latent to start from.

    Raises:
        OptionError: An argument is out of range.
    """
    if not 0.0 < strength <= 1.0:
        raise OptionError(f"strength is {strength}, expected more than 0 and at most 1")
    if spacing == "leading":
        every = ddim_timesteps(steps, training_steps=schedule.steps)
        # The small term: 0.29 · 100 is 28.999… in floating point and means 29.
        count = max(1, math.floor(steps * strength + 1e-9))
        return every[:count], every[min(count, steps - 1)]
    if not 1 <= steps <= schedule.steps:
        raise OptionError(f"steps is {steps}, expected 1 to {schedule.steps}")
    count = max(1, math.floor(steps * strength + 0.5))
    end = max(1, round(schedule.steps * strength))
    timesteps = spaced_timesteps(schedule, count, end, spacing)
    return timesteps, timesteps[-1]


def spaced_timesteps(
    schedule: NoiseSchedule, n: int, end: int, spacing: Spacing
) -> tuple[int, ...]:
    """n timesteps below `end`, its last one included.

    * ``"trailing"``: even in time (Lin et al., arXiv 2305.08891, section 3.3);
    * ``"karras"``: even in σ̄^(1/7), σ̄ = σ/α (Karras et al., arXiv 2206.00364, equation 5), down
      to the noise level of timestep 0, which is left to the clean end;
    * ``"ays"``: along the levels found best for Stable Diffusion 1.5 (Sabour et al.,
      arXiv 2404.14507), interpolated log-linearly.

    Noise levels are rounded to whole timesteps, each used once.

    Args:
        schedule: Noise schedule of the model.
        n: Number of timesteps, at least 1.
        end: One more than the highest timestep.
        spacing: One of those.

    Returns:
        Ascending timesteps.

    Raises:
        OptionError: So many timesteps do not fit, or the spacing is none of those.
    """
    if spacing == "trailing":
        return trailing_timesteps(n, end)
    if spacing not in ("karras", "ays"):
        raise OptionError(f"spacing is {spacing!r}, expected one of {', '.join(SPACINGS)}")
    if not 1 <= n <= end:
        raise OptionError(f"steps is {n}, expected 1 to {end}")
    ratios = [schedule.noise(t) / schedule.signal(t) for t in range(end)]
    highest, lowest = ratios[-1], ratios[0]
    if spacing == "karras":
        ramp = np.linspace(highest ** (1 / _RHO), lowest ** (1 / _RHO), n + 1)[:-1]
        levels = np.log(ramp**_RHO)
    else:
        scale = (schedule.steps - 1) / _ALIGNED[0]
        known = [math.log(_ratio(schedule, t * scale)) for t in _ALIGNED] + [math.log(lowest)]
        # Position along the curve at which this run starts, then even from there to its end.
        position = np.arange(len(known))
        start = float(np.interp(-math.log(highest), -np.array(known), position))
        wanted = np.linspace(start, position[-1], n + 1)[:-1]
        levels = np.interp(wanted, position, known)
    nearest = np.interp(levels, np.log(ratios), np.arange(end))
    return _distinct([round(float(t)) for t in nearest], end)


def _ratio(schedule: NoiseSchedule, timestep: float) -> float:
    whole = round(timestep)
    return schedule.noise(whole) / schedule.signal(whole)


def _distinct(falling: list[int], end: int) -> tuple[int, ...]:
    """The same timesteps, ascending, neighbours that rounding brought together moved apart."""
    n = len(falling)
    result: list[int] = []
    for index, timestep in enumerate(falling):
        # Leave room below for all that are still to come.
        highest = end - 1 if not result else result[-1] - 1
        result.append(max(min(timestep, highest), n - 1 - index))
    return tuple(reversed(result))
