"""Drawn faces in the photo's colours."""

from __future__ import annotations

import numpy as np
import pytest

from diffveil.tones import match_tones


@pytest.mark.parametrize("faces", [1, 3])
def test_faces_get_the_photos_mean_and_spread(rng: np.random.Generator, faces: int) -> None:
    photo = rng.normal(0.1, 0.16, (faces, 3, 41, 41)).clip(-1, 1).astype(np.float32)
    drawn = rng.normal(-0.1, 0.15, (faces, 3, 41, 41)).clip(-1, 1).astype(np.float32)
    mask = np.zeros((41, 41), np.float32)
    mask[4:36, 5:37] = 1.0
    matched = match_tones(drawn, photo, mask)
    inside = mask > 0
    for ours, theirs in zip(matched, photo, strict=True):
        for channel in range(3):
            a, b = ours[channel][inside], theirs[channel][inside]
            assert a.mean() == pytest.approx(b.mean(), abs=0.01)
            assert a.std() == pytest.approx(b.std(), rel=0.05)
    np.testing.assert_array_equal(matched[:, :, ~inside], drawn[:, :, ~inside])


def test_flat_faces_stay_finite_and_contrast_is_bounded() -> None:
    flat = np.zeros((1, 3, 8, 8), np.float32)
    loud = np.tile(np.float32([-1, 1]), 32).reshape(1, 1, 8, 8).repeat(3, 1)
    mask = np.ones((8, 8), np.float32)
    np.testing.assert_allclose(match_tones(flat, loud, mask), 0.0, atol=1e-6)
    quiet = match_tones(loud, flat, mask)
    np.testing.assert_allclose(np.abs(quiet), 0.8, atol=1e-5)
    np.testing.assert_array_equal(match_tones(loud, flat, np.zeros((8, 8), np.float32)), loud)
