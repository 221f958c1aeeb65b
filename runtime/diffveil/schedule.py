"""Noise schedule of the diffusion process, and which timesteps a sampler visits.

A latent at timestep t is ``signal(t) * clean + noise(t) * gaussian`` with
``signal(t)**2 + noise(t)**2 == 1`` (Ho et al., "Denoising Diffusion Probabilistic Models",
arXiv 2006.11239, equation 4). Everything here is host arithmetic in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from diffveil.errors import OptionError

__all__ = [
    "CLEAN",
    "STAGES",
    "NoiseSchedule",
    "ddim_timesteps",
    "stage_of",
    "trailing_timesteps",
    "uniform_nodes",
]

CLEAN = -1
"""Timestep that stands for "the clean end": it has the noise level of timestep 0."""

STAGES = 10
"""Number of timestep ranges, each with its own conditional embedding."""

_TRAINING_STEPS = 1000


@dataclass(frozen=True)
class NoiseSchedule:
    """A "scaled linear" schedule: beta grows linearly in its square root.

    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
    arXiv 2112.10752, as used by Stable Diffusion 1.x. The clean end has the noise level of
    timestep 0 rather than none, as there (``set_alpha_to_one=False``).

    Attributes:
        steps: Number of timesteps the model was trained with.
        beta_start: Variance added at timestep 0, in (0, 1).
        beta_end: Variance added at the last timestep, in [beta_start, 1).

    Raises:
        OptionError: An attribute is out of range.
    """

    steps: int = _TRAINING_STEPS
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self) -> None:
        problems = []
        if self.steps < 2:
            problems.append(f"steps is {self.steps}, expected at least 2")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            problems.append(
                f"beta_start is {self.beta_start} and beta_end is {self.beta_end}, "
                "expected 0 < beta_start <= beta_end < 1"
            )
        if problems:
            raise OptionError("noise schedule: " + "; ".join(problems))

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float64]:
        """Share of signal variance left at each timestep: [steps], float64, read-only, falling."""
        low, high = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        betas = np.linspace(low, high, self.steps, dtype=np.float64) ** 2
        alphas_cumprod = np.cumprod(1.0 - betas, dtype=np.float64)
        alphas_cumprod.setflags(write=False)
        return alphas_cumprod

    def signal(self, timestep: int) -> float:
        """Factor of the clean latent at a timestep: sqrt of ``alphas_cumprod``.

        Args:
            timestep: 0 … steps - 1, or ``CLEAN``.

        Raises:
            OptionError: The timestep does not exist.
        """
        return math.sqrt(self._alpha_cumprod(timestep))

    def noise(self, timestep: int) -> float:
        """Standard deviation of the Gaussian at a timestep: sqrt(1 - ``alphas_cumprod``).

        Args:
            timestep: 0 … steps - 1, or ``CLEAN``.

        Raises:
            OptionError: The timestep does not exist.
        """
        return math.sqrt(1.0 - self._alpha_cumprod(timestep))

    def _alpha_cumprod(self, timestep: int) -> float:
        if not CLEAN <= timestep < self.steps:
            raise OptionError(
                f"timestep is {timestep}, expected 0 to {self.steps - 1}, or {CLEAN} for clean"
            )
        # Written out: a negative index would silently mean the noisiest timestep.
        return float(self.alphas_cumprod[max(timestep, 0)])


def stage_of(timestep: int, training_steps: int = _TRAINING_STEPS) -> int:
    """Index of the conditional embedding that belongs to a timestep.

    Args:
        timestep: 0 … training_steps - 1.
        training_steps: Number of timesteps the model was trained with.

    Returns:
        Stage, 0 … 9; stage 0 holds the least noise.

    Raises:
        OptionError: The timestep does not exist.
    """
    if not 0 <= timestep < training_steps:
        raise OptionError(f"timestep is {timestep}, expected 0 to {training_steps - 1}")
    return timestep * STAGES // training_steps


def ddim_timesteps(
    n: int, offset: int = 1, training_steps: int = _TRAINING_STEPS
) -> tuple[int, ...]:
    """Timesteps of uniform ("leading") spacing: offset, offset + stride, …

    Args:
        n: Number of timesteps.
        offset: First timestep; Stable Diffusion uses 1.
        training_steps: Number of timesteps the model was trained with.

    Returns:
        n ascending timesteps, for example 1, 21, 41 … 981 for n = 50.

    Raises:
        OptionError: So many timesteps do not fit.
    """
    if not 1 <= n <= training_steps:
        raise OptionError(f"steps is {n}, expected 1 to {training_steps - offset}")
    stride = training_steps // n
    last = (n - 1) * stride + offset
    if offset < 0 or last >= training_steps:
        raise OptionError(
            f"{n} steps with offset {offset} end at timestep {last}, "
            f"expected at most {training_steps - 1}: use fewer steps"
        )
    return tuple(range(offset, last + 1, stride))


def trailing_timesteps(n: int, end: int = _TRAINING_STEPS) -> tuple[int, ...]:
    """Timesteps that divide [0, end) evenly and include its last one.

    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891,
    section 3.3: with few steps, none of them is spent on an almost clean latent.

    Args:
        n: Number of timesteps.
        end: One more than the highest timestep.

    Returns:
        n ascending timesteps, for example 199, 399, 599 for n = 3 and end = 600.

    Raises:
        OptionError: So many timesteps do not fit.
    """
    if not 1 <= n <= end:
        raise OptionError(f"steps is {n}, expected 1 to {end}")
    return tuple(_divide_rounded(end * i, n) - 1 for i in range(1, n + 1))


def uniform_nodes(n: int, first: int = 1, last: int = 999) -> tuple[int, ...]:
    """Timesteps spread evenly over [first, last], both ends included, rounded half up.

    Args:
        n: Number of nodes, at least 2.
        first: Lowest timestep.
        last: Highest timestep.

    Returns:
        n strictly ascending timesteps.

    Raises:
        OptionError: So many distinct timesteps do not fit.
    """
    if not 0 <= first < last:
        raise OptionError(f"first is {first} and last is {last}, expected 0 <= first < last")
    if not 2 <= n <= last - first + 1:
        raise OptionError(f"nodes is {n}, expected 2 to {last - first + 1}")
    return tuple(first + _divide_rounded((last - first) * i, n - 1) for i in range(n))


def _divide_rounded(numerator: int, denominator: int) -> int:
    """Quotient of non-negative integers rounded half up: exact, unlike a float's rounding."""
    return (2 * numerator + denominator) // (2 * denominator)
