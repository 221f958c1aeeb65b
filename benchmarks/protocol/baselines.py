"""Blur and mosaic as the tool `deface` 1.5 draws them at its default strengths.

Written from its documented options: the detector's box grows by 0.3 of its size to every side
(`--mask-scale 1.3`); *blur* is a box filter half as wide and half as high as the grown box, shown
inside the ellipse that the box holds; *mosaic* is squares of 20 pixels in the whole box, each of
the colour of its first pixel (`--mosaicsize 20`). OpenCV does the filtering there, NumPy here: the
pictures agree but for rounding and the last row and column of the mosaic, times do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from diffveil.faces import Face

__all__ = ["BASELINES", "blur", "mosaic"]

Pixels = NDArray[np.uint8]

_GROWTH = 0.3  # of the box, to every side
_BLUR_SHARE = 2  # the filter is the box divided by this
_MOSAIC_PIXELS = 20


def blur(pixels: Pixels, face: Face) -> Pixels:
    """A photo whose face is blurred.

    Args:
        pixels: uint8 [H, W, 3].
        face: Where; boxes may reach over the border.

    Returns:
        uint8 [H, W, 3], a new array.
    """
    x0, y0, x1, y1 = _region(pixels, face)
    result: Pixels = pixels.copy()
    height, width = y1 - y0, x1 - x0
    if height < 2 * _BLUR_SHARE or width < 2 * _BLUR_SHARE:
        return result
    region = pixels[y0:y1, x0:x1].astype(np.float64)
    soft = _box_filter(_box_filter(region, height // _BLUR_SHARE, 0), width // _BLUR_SHARE, 1)
    y, x = np.mgrid[0:height, 0:width]
    ry, rx = height // 2, width // 2
    inside = ((y - ry) / ry) ** 2 + ((x - rx) / rx) ** 2 < 1
    result[y0:y1, x0:x1][inside] = np.rint(soft[inside]).astype(np.uint8)
    return result


def mosaic(pixels: Pixels, face: Face) -> Pixels:
    """A photo whose face is a mosaic; arguments and result as `blur`."""
    x0, y0, x1, y1 = _region(pixels, face)
    result: Pixels = pixels.copy()
    rows = y0 + np.arange(y1 - y0) // _MOSAIC_PIXELS * _MOSAIC_PIXELS
    columns = x0 + np.arange(x1 - x0) // _MOSAIC_PIXELS * _MOSAIC_PIXELS
    result[y0:y1, x0:x1] = pixels[rows[:, None], columns]
    return result


def _region(pixels: Pixels, face: Face) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 (past the end) of the grown box, within the photo."""
    x0, y0, x1, y1 = (int(v) for v in face.box)
    dx, dy = _GROWTH * (x1 - x0), _GROWTH * (y1 - y0)
    low = max(0, round(x0 - dx)), max(0, round(y0 - dy))
    # The tool stops one pixel short of the far borders.
    high = (min(pixels.shape[1] - 1, round(x1 + dx)), min(pixels.shape[0] - 1, round(y1 + dy)))
    return (*low, max(low[0], high[0]), max(low[1], high[1]))


def _box_filter(values: NDArray[np.float64], width: int, axis: int) -> NDArray[np.float64]:
    """Running mean of `width` samples, the border mirrored without its own sample.

    The window of an even width has its middle right of the half, as OpenCV's has.
    """
    before = width // 2
    pad = [(0, 0)] * values.ndim
    pad[axis] = (before, width - 1 - before)
    sums = np.cumsum(np.pad(values, pad, mode="reflect"), axis=axis)
    shape = list(values.shape)
    shape[axis] = 1
    sums = np.concatenate([np.zeros(shape), sums], axis=axis)
    count = values.shape[axis]
    upper = np.take(sums, np.arange(width, width + count), axis=axis)
    mean: NDArray[np.float64] = (upper - np.take(sums, np.arange(count), axis=axis)) / width
    return mean


#: Every baseline by name: photo and face to photo.
BASELINES: Mapping[str, Callable[[Pixels, Face], Pixels]] = MappingProxyType(
    {"blur": blur, "mosaic": mosaic}
)
