"""Kernels that let tests see the inside of ours."""

from __future__ import annotations

import triton
import triton.language as tl

from diffveil_kernels.jit.keyed_normal import _box_muller


@triton.jit
def box_muller(words, x, y, COUNT: tl.constexpr):
    """Box–Muller of words and of the same words backwards."""
    at = tl.arange(0, COUNT)
    first = tl.load(words + at).to(tl.uint32, bitcast=True)
    second = tl.load(words + COUNT - 1 - at).to(tl.uint32, bitcast=True)
    a, b = _box_muller(first, second)
    tl.store(x + at, a)
    tl.store(y + at, b)
