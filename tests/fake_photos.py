"""Photos and faces for tests of whole photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffveil import Face, RecoveryKey, Result
from diffveil.align import template_for
from diffveil.plans import Inversion
from diffveil.presets import PRESETS

__all__ = ["ONE", "PRESET", "TWO", "ListedDetector", "Pixels", "face_at", "key_of", "smooth_photo"]

Pixels = NDArray[np.uint8]

_BALANCED = PRESETS["balanced"].with_(steps=4, strength=0.6)
PRESET = replace(
    _BALANCED,
    anonymize=replace(_BALANCED.anonymize, fresh_noise=1.0, redraws=0),
    hide=replace(_BALANCED.hide, fresh_noise=1.0, redraws=0),
    recovery=Inversion("o-belm", 3),
)
"""Few steps, so that tests are quick, and the exact sampler."""


def face_at(x: float, y: float, size: float = 40.0, turn: float = 0.0, score: float = 0.9) -> Face:
    """A face whose crop is about `size` pixels wide, centred at (x, y), turned by radians."""
    points = (template_for(32) - 15.5) * (size / 32)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = points @ rotation.T + (x, y)
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return Face((x0, y0, x1, y1), points, score)


TWO = [face_at(40, 50), face_at(120, 60, 56, turn=0.3)]
"""The faces of `group`."""

ONE = [face_at(50, 40, 30, turn=-0.2)]
"""The face of `portrait`."""


class ListedDetector:
    """Finds the faces that are listed for a photo's size, and remembers what it saw."""

    def __init__(self, faces: dict[tuple[int, int], list[Face]]) -> None:
        self.faces = faces
        self.seen: list[tuple[int, ...]] = []

    def detect(self, pixels: Pixels, /) -> Sequence[Face]:
        assert pixels.dtype == np.uint8
        self.seen.append(pixels.shape)
        return self.faces.get(pixels.shape[:2], [])


def smooth_photo(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Something with colours everywhere and little detail, as photos have."""
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def key_of(result: Result) -> RecoveryKey:
    assert result.key is not None
    return result.key
