"""Blur and mosaic as the tool `deface` 1.5 draws them at its default strengths.

Written from its documented options: the detector's box grows by 0.3 of its size to every side
(`--mask-scale 1.3`); *blur* is a box filter half as wide and half as high as the grown box, shown
inside the ellipse that the box holds; *mosaic* is squares of 20 pixels in the whole box, each of
the colour of its first pixel (`--mosaicsize 20`). Faces are drawn one after the other. OpenCV does
the filtering there, NumPy here: the pictures agree but for rounding and the last row and column of
the mosaic, times do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.faces import Face

__all__ = ["BASELINES", "blur", "mosaic"]

Pixels: TypeAlias = NDArray[np.uint8]

_GROWTH = 0.3  # of the box, to every side
_BLUR_SHARE = 2  # the filter is the box divided by this
_MOSAIC_PIXELS = 20


def blur(pixels: Pixels, *faces: Face) -> Pixels:
    """A photo whose faces are blurred.

    Args:
        pixels: uint8 [H, W, 3].
        faces: Where; boxes may reach over the border. Boxes of a few pixels stay as they are.

    Returns:
        uint8 [H, W, 3], a new array.
    """
    result: Pixels = pixels.copy()
    for face in faces:
        x0, y0, x1, y1 = _region(pixels, face)
        height, width = y1 - y0, x1 - x0
        if height < 2 * _BLUR_SHARE or width < 2 * _BLUR_SHARE:
            continue
        region = result[y0:y1, x0:x1]
        soft = _box_filter(region, height // _BLUR_SHARE, width // _BLUR_SHARE)
        y, x = np.ogrid[0:height, 0:width]
        ry, rx = height // 2, width // 2
        inside = ((y - ry) / ry) ** 2 + ((x - rx) / rx) ** 2 < 1
        region[inside] = np.rint(soft[inside]).astype(np.uint8)
    return result


def mosaic(pixels: Pixels, *faces: Face) -> Pixels:
    """A photo whose faces are mosaics; arguments and result as `blur`."""
    result: Pixels = pixels.copy()
    for face in faces:
        x0, y0, x1, y1 = _region(pixels, face)
        tiles = result[y0:y1:_MOSAIC_PIXELS, x0:x1:_MOSAIC_PIXELS]
        tiles = tiles.repeat(_MOSAIC_PIXELS, axis=0).repeat(_MOSAIC_PIXELS, axis=1)
        result[y0:y1, x0:x1] = tiles[: y1 - y0, : x1 - x0]
    return result


def _region(pixels: Pixels, face: Face) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 (past the end) of the grown box, within the photo."""
    x0, y0, x1, y1 = (int(v) for v in face.box)
    dx, dy = _GROWTH * (x1 - x0), _GROWTH * (y1 - y0)
    low = max(0, round(x0 - dx)), max(0, round(y0 - dy))
    # The tool stops one pixel short of the far borders.
    high = (min(pixels.shape[1] - 1, round(x1 + dx)), min(pixels.shape[0] - 1, round(y1 + dy)))
    return (*low, max(low[0], high[0]), max(low[1], high[1]))


def _box_filter(values: Pixels, height: int, width: int) -> NDArray[np.float64]:
    """Means of windows of `height` × `width`, the border mirrored without its own sample.

    A window of even size has its middle right of the half, as OpenCV's has. Running sums may wrap
    around: their differences do not, up to windows of 16 million pixels.
    """
    sums = values.astype(np.uint32)
    for axis, size in enumerate((height, width)):
        before = size // 2
        pad = [(0, 0)] * sums.ndim
        pad[axis] = (before, size - 1 - before)
        sums = np.pad(sums, pad, mode="reflect").swapaxes(0, axis)
        sums = np.cumsum(sums, axis=0, dtype=np.uint32)
        sums[size:] -= sums[:-size].copy()
        sums = sums[size - 1 :].swapaxes(0, axis)
    mean: NDArray[np.float64] = sums / (height * width)
    return mean


#: Every baseline by name: photo and faces to photo.
BASELINES: Mapping[str, Callable[..., Pixels]] = MappingProxyType({"blur": blur, "mosaic": mosaic})
