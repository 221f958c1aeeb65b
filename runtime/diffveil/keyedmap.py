"""Orthogonal maps as a function of a key: what moves a face's noise out of sight and back."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.errors import OptionError
from diffveil.noise import NoiseKey

__all__ = ["KeyedMap"]

_F32: TypeAlias = NDArray[np.float32]


class KeyedMap:
    """A signed permutation of n coordinates, drawn from a key's ChaCha20 stream.

    It is orthogonal, so a unit Gaussian stays one and nothing is stretched; it moves and negates
    floats but never rounds one, so `undo` gives back every bit that `apply` was given. Place and
    sign come from streams of their own (HKDF labels).

    Args:
        key: Key used for nothing else.
        size: Number n of coordinates, at least 1.

    Raises:
        OptionError: The size is out of range.
    """

    def __init__(self, key: NoiseKey, size: int) -> None:
        if size < 1:
            raise OptionError(f"a keyed map of {size} coordinates, expected at least 1")
        words = key.derive("diffveil/v1/map/order").words(2 * size)
        # 64 bits a coordinate: two that tie, which a stable sort settles, are one in 2**40 maps.
        ranks = words[::2].astype(np.uint64) << np.uint64(32) | words[1::2]
        self._order = np.argsort(ranks, kind="stable")
        bits = key.derive("diffveil/v1/map/sign").words(size) & np.uint32(1)
        self._signs = np.where(bits == 1, np.float32(-1.0), np.float32(1.0))

    def __len__(self) -> int:
        return len(self._order)

    def apply(self, values: _F32) -> _F32:
        """Map values, float32 […, n]."""
        self._check(values)
        return np.asarray(values[..., self._order] * self._signs, dtype=np.float32)

    def undo(self, values: _F32) -> _F32:
        """The values that `apply` has mapped to these, float32 […, n]."""
        self._check(values)
        result = np.empty(values.shape, dtype=np.float32)
        result[..., self._order] = values * self._signs
        return result

    def _check(self, values: _F32) -> None:
        if values.shape[-1:] != (len(self),):
            raise OptionError(
                f"values: received {list(values.shape)}, expected a last axis of {len(self)}"
            )
