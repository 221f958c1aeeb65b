"""ChaCha20 (RFC 8439) and Box–Muller in one kernel: keys in, unit Gaussians out.

Every operation is one whose rounding IEEE 754 defines: integer arithmetic, and float64 additions,
multiplications, one division and one square root. Compiled without contraction to fused
multiply-adds, the numbers are those of the CPU's `diffveil.noise.normal`, bit for bit. Float64 is
slow on most GPUs, and still cheaper here than waiting for the launch.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = ["keyed_normal", "keystream"]

# The series of `diffveil.noise`, by the same formulas.
_LN_2 = tl.constexpr(0.6931471805599453)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_ANGLE_UNIT = tl.constexpr(math.pi * 2.0**-31)
_ATANH = tl.constexpr(tuple(1.0 / (2 * k + 1) for k in range(12)))
_SINE = tl.constexpr(tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(10)))
_COSINE = tl.constexpr(tuple((-1.0) ** k / math.factorial(2 * k) for k in range(10)))


@triton.jit
def keyed_normal(keys, out, count, BLOCKS: tl.constexpr):
    """Program (n, m) writes the normals of `BLOCKS` consecutive blocks of keystream n.

    keys: int32 [N, 8]. out: float32 [N, count].
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    # fmt: off
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = _chacha20(
        keys + row * 8, block, 0, 0, 0
    )
    # fmt: on
    x, y = _box_muller(
        _eight(w0, w2, w4, w6, w8, w10, w12, w14), _eight(w1, w3, w5, w7, w9, w11, w13, w15)
    )
    values = tl.join(x, y)  # [BLOCKS, 2, 2, 2, 2], in the order of the words
    at = tl.program_id(1) * (16 * BLOCKS) + tl.arange(0, 16 * BLOCKS)
    tl.store(out + row * count + at, tl.reshape(values, [16 * BLOCKS]), mask=at < count)


@triton.jit
def keystream(keys, out, blocks, counter, nonce0, nonce1, nonce2, BLOCKS: tl.constexpr):
    """Program (n, m) writes `BLOCKS` consecutive blocks of keystream n.

    keys: int32 [N, 8]. out: int32 [N, 16 * blocks]. counter, nonce: int32, the words' bits.
    """
    row = tl.program_id(0).to(tl.int64)
    block = counter + tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    # fmt: off
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = _chacha20(
        keys + row * 8, block, nonce0, nonce1, nonce2
    )
    # fmt: on
    even = _eight(w0, w2, w4, w6, w8, w10, w12, w14)
    words = tl.join(even, _eight(w1, w3, w5, w7, w9, w11, w13, w15))
    at = tl.program_id(1) * (16 * BLOCKS) + tl.arange(0, 16 * BLOCKS)
    words = tl.reshape(words.to(tl.int32, bitcast=True), [16 * BLOCKS])
    tl.store(out + row * (16 * blocks) + at, words, mask=at < 16 * blocks)


@triton.jit
def _chacha20(key, block, nonce0, nonce1, nonce2):
    """The 16 words of each block [B] of the keystream, uint32 [B] each."""
    block = block.to(tl.uint32, bitcast=True)
    zero = block ^ block
    k0 = zero + tl.load(key).to(tl.uint32, bitcast=True)
    k1 = zero + tl.load(key + 1).to(tl.uint32, bitcast=True)
    k2 = zero + tl.load(key + 2).to(tl.uint32, bitcast=True)
    k3 = zero + tl.load(key + 3).to(tl.uint32, bitcast=True)
    k4 = zero + tl.load(key + 4).to(tl.uint32, bitcast=True)
    k5 = zero + tl.load(key + 5).to(tl.uint32, bitcast=True)
    k6 = zero + tl.load(key + 6).to(tl.uint32, bitcast=True)
    k7 = zero + tl.load(key + 7).to(tl.uint32, bitcast=True)
    n0 = (zero.to(tl.int32, bitcast=True) + nonce0).to(tl.uint32, bitcast=True)
    n1 = (zero.to(tl.int32, bitcast=True) + nonce1).to(tl.uint32, bitcast=True)
    n2 = (zero.to(tl.int32, bitcast=True) + nonce2).to(tl.uint32, bitcast=True)
    c0, c1, c2, c3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    w0, w1, w2, w3, w4, w5, w6, w7 = c0, c1, c2, c3, k0, k1, k2, k3
    w8, w9, w10, w11, w12, w13, w14, w15 = k4, k5, k6, k7, block, n0, n1, n2
    for _ in range(10):
        w0, w4, w8, w12 = _quarter_round(w0, w4, w8, w12)
        w1, w5, w9, w13 = _quarter_round(w1, w5, w9, w13)
        w2, w6, w10, w14 = _quarter_round(w2, w6, w10, w14)
        w3, w7, w11, w15 = _quarter_round(w3, w7, w11, w15)
        w0, w5, w10, w15 = _quarter_round(w0, w5, w10, w15)
        w1, w6, w11, w12 = _quarter_round(w1, w6, w11, w12)
        w2, w7, w8, w13 = _quarter_round(w2, w7, w8, w13)
        w3, w4, w9, w14 = _quarter_round(w3, w4, w9, w14)
    # fmt: off
    return (
        w0 + c0, w1 + c1, w2 + c2, w3 + c3, w4 + k0, w5 + k1, w6 + k2, w7 + k3,
        w8 + k4, w9 + k5, w10 + k6, w11 + k7, w12 + block, w13 + n0, w14 + n1, w15 + n2,
    )
    # fmt: on


@triton.jit
def _quarter_round(a, b, c, d):
    """RFC 8439, section 2.1."""
    a += b
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def _eight(x0, x1, x2, x3, x4, x5, x6, x7):
    """[B] eight times, as [B, 2, 2, 2]."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    return tl.join(even, tl.join(tl.join(x1, x5), tl.join(x3, x7)))


@triton.jit
def _box_muller(word0, word1):
    """Two words, uint32 → two unit Gaussians, float32, of the same shape."""
    u = (word0.to(tl.float64) + 0.5) * 2.0**-32
    radius = tl.sqrt(-2.0 * _log(u))
    angle = ((word1 & 0x3FFFFFFF).to(tl.float64) + (0.5 - 2.0**29)) * _ANGLE_UNIT
    square = angle * angle
    cosine = _horner(_COSINE, 10, square)
    sine = angle * _horner(_SINE, 10, square)
    quadrant = word1 >> 30
    odd = (quadrant & 1) == 1
    x, y = tl.where(odd, -sine, cosine), tl.where(odd, cosine, sine)
    x, y = tl.where(quadrant >= 2, -x, x), tl.where(quadrant >= 2, -y, y)
    return (radius * x).to(tl.float32), (radius * y).to(tl.float32)


@triton.jit
def _log(u):
    """Natural logarithm of normal float64: exponent · ln 2 + 2 atanh((m - 1) / (m + 1))."""
    bits = u.to(tl.int64, bitcast=True)
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    low = mantissa < _SQRT_HALF
    mantissa = tl.where(low, 2.0 * mantissa, mantissa)
    power = ((bits >> 52) - 1022 - low.to(tl.int64)).to(tl.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return power * _LN_2 + 2.0 * s * _horner(_ATANH, 12, s * s)


@triton.jit
def _horner(COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr, x):
    total = x * 0.0 + COEFFICIENTS[COUNT - 1]
    for k in tl.static_range(COUNT - 2, -1, -1):
        total = total * x + COEFFICIENTS[k]
    return total
