"""One row of a sampler table, applied: sampler, guidance and background."""

from __future__ import annotations

from diffveil_kernels.reference._arrays import Array, cast, namespace

__all__ = ["VANISHING_RMS", "linear_step"]

VANISHING_RMS = 1e-12
"""Below this a gradient is rounding noise, and of unit size it would push somewhere at random."""


def linear_step(
    latent: Array,
    previous: Array,
    epsilon: Array,
    previous_epsilon: Array,
    noise: Array,
    gradient: Array,
    background: Array,
    mask: Array,
    coefficients: Array,
    pushed: Array,
    normalise: Array,
    blend: Array,
) -> Array:
    """The next latent: background + mask · (x - background), where

        x = a0·latent + a1·previous + b0·ε + b1·ε_prev + n·noise - g·gradient.

    Summed in float64 and rounded once; the blend is float32. A tensor whose coefficient is zero in
    a row does not count there, whatever it holds.

    Args:
        latent: [B, C, s, s], float32, as are all tensors of this shape.
        previous: Latent one node back.
        epsilon: Prediction for `latent`.
        previous_epsilon: Prediction of the step before.
        noise: Fresh unit Gaussians.
        gradient: Of the guide's energy.
        background: What the latent is where `mask` is zero.
        mask: [B, 1, s, s], float32, 0 … 1.
        coefficients: float64 [B, 8]: a0, a1, b0, b1, n, g, and two that are not used here.
        pushed: float32 [B]; a row's gradient counts where this is above zero.
        normalise: float32 [B]; a row's gradient is scaled to a root mean square of 1 where this is
            above zero. One below 1e-12 becomes zero.
        blend: float32 [B]; a row's background is replaced where this is above zero.

    Returns:
        [B, C, s, s], float32.
    """
    xp = namespace(latent)
    wide = cast(gradient, "float64")
    rms = xp.sqrt((wide * wide).reshape(len(wide), -1).mean(1))
    present = rms > VANISHING_RMS
    unit = xp.where(present, 1.0 / xp.where(present, rms, 1.0), 0.0)
    scale = xp.where(normalise > 0, unit, 1.0) * (pushed > 0)
    direction = cast(wide * scale[:, None, None, None], "float32")

    # [6, B, 1, 1, 1]
    a0, *others = xp.moveaxis(coefficients, 1, 0)[:6, :, None, None, None]
    x = a0 * cast(latent, "float64")
    terms = (previous, epsilon, previous_epsilon, noise, direction)
    signs = (1.0, 1.0, 1.0, 1.0, -1.0)
    for coefficient, sign, term in zip(others, signs, terms, strict=True):
        x = xp.where(coefficient != 0.0, x + sign * coefficient * cast(term, "float64"), x)
    x = cast(x, "float32")
    blended = background + mask * (x - background)
    return xp.where(blend[:, None, None, None] > 0, blended, x)
