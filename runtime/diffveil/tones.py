"""Skin tone: drawn faces get the colours of the photo's, as a whole and not feature by feature."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["match_tones"]

_F32: TypeAlias = NDArray[np.float32]
_MOST = 1.25  # times that contrast is raised or lowered at most


def match_tones(drawn: _F32, photo: _F32, mask: _F32) -> _F32:
    """Give faces the mean and the spread of the photo's colours, channel by channel.

    Six numbers of the photo's face are used, which neck and ears beside it show as well. After
    Reinhard et al., "Color transfer between images", IEEE CG&A 21(5), 2001, in RGB.

    Args:
        drawn: Faces, float32 [N, 3, S, S], RGB in [-1, 1].
        photo: The faces that they take the place of, alike.
        mask: Where the face is, float32 [S, S] or [N, 1, S, S], 0 … 1.

    Returns:
        Like `drawn`, clipped to [-1, 1]; as it was where the mask is 0.
    """
    weight = np.broadcast_to(mask, (len(drawn), 1, *drawn.shape[2:])).astype(np.float64)
    total = np.maximum(weight.sum(axis=(2, 3), keepdims=True), 1e-6)

    def moments(image: _F32) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        mean = (weight * image).sum(axis=(2, 3), keepdims=True) / total
        variance = (weight * (image - mean) ** 2).sum(axis=(2, 3), keepdims=True) / total
        return mean, np.sqrt(variance)

    mean, spread = moments(drawn)
    wanted, wanted_spread = moments(photo)
    gain = np.clip(wanted_spread / np.maximum(spread, 1e-3), 1 / _MOST, _MOST)
    matched = wanted + gain * (drawn - mean)
    result: _F32 = np.clip(drawn + weight * (matched - drawn), -1.0, 1.0).astype(np.float32)
    return result
