"""One row of a sampler table in one pass over memory: sampler, guidance and background.

Sums are float64 as in `diffveil.sampling.run`, and compiled without fused multiply-adds, so that
the latents are the CPU's: a step and its exact inverse differ by one rounding to float32 only. The
latents of a batch are small; what float64 costs hides behind the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["linear_step", "sum_of_squares"]

_VANISHING_RMS = tl.constexpr(1e-12)


@triton.jit
def sum_of_squares(
    gradient, coefficients, pushed, sums, count, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (b, p) adds up the squares of part p of a row; rows that nothing is made of are zero.

    gradient: float32 [B, count]. coefficients: float64 [B, 8]. pushed: float32 [B].
    sums: float64 [B, PARTS].
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    wanted = (tl.load(coefficients + row * 8 + 5) != 0.0) & (tl.load(pushed + row) > 0.0)
    share = (count + PARTS - 1) // PARTS
    start = part * share
    # A row that is not wanted ends where it starts.
    end = tl.where(wanted, tl.minimum(start + share, count), start)
    total = tl.full([BLOCK], 0.0, tl.float64)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(gradient + row * count + at, mask=at < end, other=0.0).to(tl.float64)
        total += value * value
    tl.store(sums + row * PARTS + part, tl.reduce(total, 0, _add))


@triton.jit
def linear_step(
    latent,
    previous,
    epsilon,
    previous_epsilon,
    noise,
    gradient,
    background,
    mask,
    coefficients,
    pushed,
    normalise,
    blend,
    sums,
    out,
    count,
    plane,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (b, m) computes `BLOCK` elements of row b.

    latent … background, out: float32 [B, count]; one whose coefficient is zero is not read.
    mask: float32 [B, plane]. coefficients: float64 [B, 8]: a0, a1, b0, b1, n, g, unused, unused.
    pushed, normalise, blend: float32 [B], flags. sums: float64 [B, PARTS], of the gradient's
    squares, not read where `normalise` is zero. count: channels times plane.
    """
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    at = row * count + index
    c = coefficients + row * 8
    x = tl.load(c) * tl.load(latent + at, mask=inside, other=0.0).to(tl.float64)
    x = _add_term(x, tl.load(c + 1), previous + at, index, count)
    x = _add_term(x, tl.load(c + 2), epsilon + at, index, count)
    x = _add_term(x, tl.load(c + 3), previous_epsilon + at, index, count)
    x = _add_term(x, tl.load(c + 4), noise + at, index, count)

    g = tl.load(c + 5)
    guided = (g != 0.0) & (tl.load(pushed + row) > 0.0)
    unit = tl.load(normalise + row) > 0.0
    part = tl.arange(0, PARTS)
    summed = part < tl.where(guided & unit, PARTS, 0)
    parts = tl.load(sums + row * PARTS + part, mask=summed, other=0.0)
    rms = tl.sqrt(tl.reduce(parts, 0, _add) / count)
    present = rms > _VANISHING_RMS
    scale = tl.where(present, 1.0 / tl.where(present, rms, 1.0), 0.0)
    scale = tl.where(unit, scale, 1.0)
    steered = index < tl.where(guided, count, 0)
    direction = tl.load(gradient + at, mask=steered, other=0.0).to(tl.float64)
    direction = (direction * scale).to(tl.float32).to(tl.float64)
    x = tl.where(steered, x + (-g) * direction, x)

    value = x.to(tl.float32)
    blended = index < tl.where(tl.load(blend + row) > 0.0, count, 0)
    behind = tl.load(background + at, mask=blended, other=0.0)
    share = tl.load(mask + row * plane + index % plane, mask=blended, other=0.0)
    value = tl.where(blended, behind + share * (value - behind), value)
    tl.store(out + at, value, mask=inside)


@triton.jit
def _add_term(total, coefficient, term, index, count):
    used = index < tl.where(coefficient != 0.0, count, 0)
    value = tl.load(term, mask=used, other=0.0).to(tl.float64)
    return tl.where(used, total + coefficient * value, total)


@triton.jit
def _add(a, b):
    return a + b
