"""Which picture a recovery key belongs to: exactly, or but for its encoding."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffveil.facekeys import COARSE_SIDE, Picture
from diffveil.photos import Photo, photo_digest

__all__ = ["MAX_COARSE_DIFFERENCE", "is_one_of", "looks_like_one_of", "picture_of"]

MAX_COARSE_DIFFERENCE = 8.0
"""How far the colour of a coarse cell may be off, root mean square of RGB in levels of 0 … 255, in
half of the cells of a copy that was encoded again. The other half may be faces that were recovered
meanwhile."""


def picture_of(photo: Photo) -> Picture:
    """What a key notes of a protected photo."""
    return Picture(photo_digest(photo), _coarse(photo).tobytes())


def is_one_of(pictures: Sequence[Picture], photo: Photo) -> bool:
    """Whether a photo is one of the pictures, pixel by pixel. Takes as long whichever it is."""
    digest = photo_digest(photo)
    return sum(hmac.compare_digest(digest, picture.digest) for picture in pictures) > 0


def looks_like_one_of(pictures: Sequence[Picture], photo: Photo) -> bool:
    """Whether a photo can be a lossy copy of one of the pictures, by its coarse colours."""
    mine = _coarse(photo).astype(np.float64)
    theirs = [np.frombuffer(p.coarse, np.uint8).reshape(mine.shape) for p in pictures]
    off = [np.sqrt(np.mean((mine - colours) ** 2, axis=2)) for colours in theirs]
    return any(float(np.median(cells)) <= MAX_COARSE_DIFFERENCE for cells in off)


def _coarse(photo: Photo) -> NDArray[np.uint8]:
    """Mean colours of 8×8 cells, uint8 [8, 8, 3]."""
    image = Image.fromarray(photo.pixels)
    return np.asarray(image.resize((COARSE_SIDE, COARSE_SIDE), Image.Resampling.BOX))
