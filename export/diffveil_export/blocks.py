"""Weights in four bits: integers -7 … 7, and one scale for each block of 32 along an axis."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK", "GREATEST", "fit_blocks", "pack", "read_blocks", "restore_blocks", "unpack"]

BLOCK = 32
"""Weights that share a scale."""

GREATEST = 7 * 65504.0
"""The largest weight that can be stored: scales are float16."""

_LARGEST = 7  # the range is symmetric: of -8 no restored weight could tell the scale
_LEAST = np.float16(2.0**-20)
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a block's largest weight

_F32 = NDArray[np.float32]
_F16 = NDArray[np.float16]
_Integers = NDArray[np.int8]
_Number = TypeVar("_Number", np.int8, np.float16)


def fit_blocks(weight: _F32, axis: int) -> tuple[_Integers, _F16]:
    """Round weights to blocks with the least squared error.

    A scale lets a block's largest weight be 7 or, if the others gain by it, cut down to 7. Weights
    that `restore_blocks` made come back as they are.

    Args:
        weight: None beyond `GREATEST`, the size along `axis` a multiple of `BLOCK`.
        axis: Along which blocks lie.

    Returns:
        Integers of the weight's shape, and scales, a 32nd as many along `axis`.
    """
    blocks = _blocks(weight, axis)
    largest = np.abs(blocks).max(-1, keepdims=True)
    best = np.zeros(blocks.shape, np.int8), np.ones(largest.shape, np.float16)
    least = np.full_like(largest, np.inf)
    for share in _SHARES:
        integers, scale = _rounded(blocks, np.float32(share) * largest)
        error = np.square(integers * scale.astype(np.float32) - blocks).sum(-1, keepdims=True)
        better = error < least
        best = np.where(better, integers, best[0]), np.where(better, scale, best[1])
        least = np.minimum(least, error)
    return _unblocked(best[0], axis), _unblocked(best[1], axis)


def read_blocks(weight: _F32, axis: int) -> tuple[_Integers, _F16] | None:
    """Integers and scales that restore a weight bit for bit; None if there are none."""
    axis %= weight.ndim
    if weight.shape[axis] % BLOCK or not np.abs(weight).max() <= GREATEST:
        return None
    blocks = _blocks(weight, axis)
    integers, scale = _rounded(blocks, np.abs(blocks).max(-1, keepdims=True))
    if not np.array_equal(integers * scale.astype(np.float32), blocks):
        return None
    return _unblocked(integers, axis), _unblocked(scale, axis)


def restore_blocks(integers: _Integers, scale: _F16, axis: int) -> _F32:
    """The weights; exact in float32, for three bits times eleven fit."""
    return integers.astype(np.float32) * np.repeat(scale.astype(np.float32), BLOCK, axis)


def pack(integers: NDArray[np.generic]) -> bytes:
    """Two integers a byte, the first in the lower half, as ONNX stores INT4."""
    low, high = (integers.astype(np.int8).reshape(-1)[i::2] for i in (0, 1))
    return ((low & 0x0F) | (high << 4)).astype(np.uint8).tobytes()


def unpack(raw: bytes | memoryview | NDArray[np.uint8]) -> _Integers:
    """What was packed, as one row."""
    data = np.frombuffer(raw, np.int8)
    # Shifting a signed byte right repeats its sign.
    return np.stack([(data << 4) >> 4, data >> 4], -1).reshape(-1)


def _rounded(blocks: _F32, largest: _F32) -> tuple[_Integers, _F16]:
    with np.errstate(under="ignore"):
        scale = (largest / np.float32(_LARGEST)).astype(np.float16)
    # What is too small for a scale of some digits becomes zero: it would not come back the same.
    scale = np.where(scale >= _LEAST, scale, np.float16(1)).astype(np.float16)
    levels = np.rint(blocks / scale.astype(np.float32))
    return np.clip(levels, -_LARGEST, _LARGEST).astype(np.int8), scale


def _blocks(weight: _F32, axis: int) -> _F32:
    moved = np.moveaxis(weight, axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, BLOCK)


def _unblocked(blocks: NDArray[_Number], axis: int) -> NDArray[_Number]:
    flat = blocks.reshape(*blocks.shape[:-2], -1)
    return np.ascontiguousarray(np.moveaxis(flat, -1, axis))
