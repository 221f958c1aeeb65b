"""Where training takes the face to be: landmarks follow the crop, mirrored or not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes/reference"))
from landmarks import Finder
from train_diffusion import crop

from diffveil.detectors import CenterFace

SWAPPED = [1, 0, 2, 4, 3]  # a mirrored face's left eye is the right one's mirror image


class Marks:
    """A detector of pictures in which the five landmarks are the pixels of values 50, 100 … 250."""

    def __init__(self) -> None:
        self.asked = 0

    def detect(self, pixels: np.ndarray) -> list[Any]:
        self.asked += 1
        found = marks(pixels[..., 0])
        if np.isnan(found).any():
            return []
        far = SimpleNamespace(landmarks=found * 0)  # somebody at the border
        return [far, SimpleNamespace(landmarks=found)]


def marks(plane: np.ndarray) -> np.ndarray:
    places = [np.argwhere(plane == value) for value in (50, 100, 150, 200, 250)]
    return np.array([p[0][::-1] if len(p) else (np.nan, np.nan) for p in places], np.float64)


@pytest.mark.parametrize("flip", [0, 1])
def test_landmarks_lie_where_the_crop_shows_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flip: int
) -> None:
    rng = np.random.default_rng()
    detector = Marks()
    monkeypatch.setattr(CenterFace, "load", lambda: detector)
    faces = np.zeros((2, 160, 160, 3), np.uint8)
    for value, place in zip((50, 100, 150, 200, 250), rng.permutation(60)[:5], strict=True):
        faces[0, 50 + place, 50 + rng.integers(60)] = value
    offsets = rng.integers(-6, 7, (2, 2, 2))
    find = Finder(faces, offsets, tmp_path)
    landmarks = find.landmarks(0, flip)
    assert landmarks is not None
    shown = crop(faces, np.array([0]), np.array([flip]), offsets)[0, 0].numpy()
    expected = marks(np.rint((shown + 1) * 127.5))
    np.testing.assert_array_equal(landmarks, expected[SWAPPED] if flip else expected)
    assert find.landmarks(1, flip) is None
    again = Finder(faces, offsets, tmp_path)
    np.testing.assert_array_equal(again.landmarks(0, flip), landmarks)
    assert detector.asked == 2  # one look a face


def test_turned_faces_are_told_by_their_noses(tmp_path: Path) -> None:
    ahead = np.array([[60, 70], [100, 70], [80, 90], [65, 110], [95, 110]], np.float32)
    left, right = ahead.copy(), ahead.copy()
    left[2, 0] -= 12
    right[2, 0] += 12
    tilted = right @ np.array([[0.8, 0.6], [-0.6, 0.8]], np.float32)
    np.save(tmp_path / "landmarks.npy", np.stack([ahead, left, right, tilted, ahead * np.nan]))
    find = Finder(np.zeros((5, 160, 160, 3), np.uint8), np.zeros((5, 2, 2), np.int64), tmp_path)
    assert find.turned(0.28).tolist() == [False, True, True, True, False]
    assert not find.turned(0.32).any()
    with pytest.raises(SystemExit, match="other faces"):
        Finder(np.zeros((4, 160, 160, 3), np.uint8), np.zeros((4, 2, 2), np.int64), tmp_path)
