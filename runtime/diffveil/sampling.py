"""The one loop that runs every sampler table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from diffveil.errors import EngineError, OptionError
from diffveil.samplers import SamplerTable, Step
from diffveil.schedule import NoiseSchedule

__all__ = ["Blend", "Denoise", "Gradient", "Latent", "Progress", "add_noise", "check_run", "run"]

Latent = NDArray[np.float32]
"""Latents [B, C, s, s], float32, about unit variance."""

Progress = Callable[[int, int], None]
"""Called after each step with the number of steps done and the number of all steps."""


class Denoise(Protocol):
    """A noise-predicting model with its conditioning already bound."""

    def __call__(self, x: Latent, timestep: int, /) -> Latent:
        """Predict the noise in x [B, C, s, s] at one timestep for the whole batch."""


class Gradient(Protocol):
    """Direction that guidance walks away from, already weighted per face."""

    def __call__(self, x0: Latent, step: Step, /) -> Latent:
        """Gradient of the energy at the predicted clean latent x0; the loop multiplies by g."""


class Blend(Protocol):
    """A correction of the latent that a step arrives at, for example of its background."""

    def __call__(self, x: Latent, step: Step, /) -> Latent:
        """Return what to use in place of x, the latent at ``step.next_timestep``."""


def run(
    table: SamplerTable,
    x: Latent,
    denoise: Denoise,
    *,
    x_prev: Latent | None = None,
    gradient: Gradient | None = None,
    noise: Callable[[int], Latent] | None = None,
    blend: Blend | None = None,
    progress: Progress | None = None,
) -> tuple[Latent, Latent]:
    """Run a sampler table over a batch of latents.

    Each step is summed in float64 and rounded to float32 once. So an exactly invertible table and
    its inverse differ by that one rounding a step, not by the order of the terms.

    Args:
        table: Sampler to run.
        x: Latent at ``table.start_timestep``, [B, C, s, s], float32. Not changed.
        denoise: Noise prediction for a latent at a timestep.
        x_prev: Second latent at ``table.prev_timestep``, like x, for tables that start from a pair.
        gradient: Guidance, called at steps with g ≠ 0.
        noise: Fresh unit Gaussian noise for the step at that position, called at steps with n ≠ 0.
        blend: Correction after each step.
        progress: Called after each step.

    Returns:
        The latents at the table's last node and at the one before it, each like x.

    Raises:
        OptionError: The table needs a pair, noise or guidance that is not given, or shapes differ.
        EngineError: A callback returned another shape, or the latent is no longer finite.
    """
    check_run(table, x, x_prev, gradient, noise)
    x = np.asarray(x, dtype=np.float32)
    x_prev = x if x_prev is None else np.asarray(x_prev, dtype=np.float32)
    eps_prev: Latent | None = None
    for index, step in enumerate(table.steps):
        eps = _like(x, denoise(x, step.timestep), "denoise", step)
        total = np.multiply(x, step.a0, dtype=np.float64)
        _accumulate(total, step.a1, x_prev)
        _accumulate(total, step.b0, eps)
        if step.b1 != 0.0 and eps_prev is not None:
            _accumulate(total, step.b1, eps_prev)
        if step.n != 0.0 and noise is not None:
            _accumulate(total, step.n, _like(x, noise(index), "noise", step))
        if step.g != 0.0 and gradient is not None:
            x0 = np.multiply(x, step.x0_x, dtype=np.float64)
            _accumulate(x0, step.x0_eps, eps)
            toward = gradient(x0.astype(np.float32), step)
            _accumulate(total, -step.g, _like(x, toward, "gradient", step))
        x_next = total.astype(np.float32)
        if blend is not None:
            x_next = _like(x, blend(x_next, step), "blend", step)
        if not np.isfinite(x_next).all():
            raise EngineError(
                f"{table.name}: the latent is not finite after timestep {step.timestep}; "
                "if the programs run in float16, use a bundle or backend of higher precision"
            )
        x_prev, x, eps_prev = x, x_next, eps
        if progress is not None:
            progress(index + 1, len(table.steps))
    return x, x_prev


def add_noise(schedule: NoiseSchedule, x0: Latent, noise: Latent, timestep: int) -> Latent:
    """Noise a clean latent to a timestep (arXiv 2006.11239, equation 4).

    Args:
        schedule: Noise schedule of the model.
        x0: Clean latents [B, C, s, s], float32.
        noise: Unit Gaussian noise, broadcastable with x0, float32.
        timestep: Node to noise to, for example a table's ``start_timestep``.

    Returns:
        Noised latents, float32, of the broadcast shape.

    Raises:
        OptionError: The timestep does not exist.
    """
    kept = np.multiply(x0, schedule.signal(timestep), dtype=np.float64)
    added = np.multiply(noise, schedule.noise(timestep), dtype=np.float64)
    return (kept + added).astype(np.float32)


def _accumulate(total: NDArray[np.float64], coefficient: float, term: Latent) -> None:
    # Skipping zeros keeps rows exact: 0 · inf from an unused term would be NaN.
    if coefficient != 0.0:
        total += np.multiply(term, coefficient, dtype=np.float64)


def _like(x: Latent, value: Latent, what: str, step: Step) -> Latent:
    value = np.asarray(value, dtype=np.float32)
    if value.shape != x.shape:
        raise EngineError(
            f"{what} returned shape {list(value.shape)} at timestep {step.timestep}, "
            f"expected {list(x.shape)}"
        )
    return value


def check_run(
    table: SamplerTable,
    x: Latent,
    x_prev: Latent | None,
    gradient: object | None,
    noise: object | None,
) -> None:
    """Hold what a table is run with against what it needs; arguments as of `run`.

    Raises:
        OptionError: The table needs a pair, noise or guidance that is not given, or shapes differ.
    """
    problems = []
    if table.needs_pair != (x_prev is not None):
        problems.append(
            f"it starts from {'a pair of latents' if table.needs_pair else 'one latent'}, "
            f"but x_prev is {'missing' if x_prev is None else 'given'}"
        )
    if x_prev is not None and np.shape(x_prev) != np.shape(x):
        problems.append(
            f"x_prev has shape {list(np.shape(x_prev))}, expected that of x, {list(np.shape(x))}"
        )
    # Guidance is what protects: leaving it out must never pass unnoticed.
    if gradient is None and any(step.g != 0.0 for step in table.steps):
        problems.append("it has guidance weights, but gradient is missing")
    if noise is None and any(step.n != 0.0 for step in table.steps):
        problems.append("it is stochastic, but noise is missing")
    if table.steps[0].b1 != 0.0:
        problems.append("its first step uses a prediction from before it")
    if problems:
        raise OptionError(f"sampler {table.name!r}: " + "; ".join(problems))
