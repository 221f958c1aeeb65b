"""Masks: what they cover, and that recovery covers protection."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffveil.align import template_for
from diffveil.errors import OptionError
from diffveil.masks import face_mask, fitted_mask, latent_mask, recovery_mask

SIZES = [32, 64, 112, 128, 160, 256, 512]


@pytest.mark.parametrize("size", SIZES)
def test_masks_fade_to_zero_before_the_border(size: int) -> None:
    for make in (face_mask, recovery_mask):
        mask = make(size, template_for(size))
        assert mask.shape == (size, size)
        assert mask.dtype == np.float32
        assert mask.min() == 0.0
        assert mask.max() == 1.0
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()


@pytest.mark.parametrize("size", SIZES)
def test_face_mask_is_full_from_brows_to_mouth(size: int) -> None:
    template = template_for(size)
    mask = face_mask(size, template)
    drop = template[3:, 1].mean() - template[:2, 1].mean()
    brows = template[:2] - [0, 0.35 * drop]
    for x, y in [*template, *brows]:
        assert mask[round(y), round(x)] == 1.0
    below = template[3:, 1].mean() + 0.25 * drop
    assert mask[round(below), round(template[3:, 0].mean())] > 0.9


@pytest.mark.parametrize("size", SIZES[1:])
def test_face_mask_fades_slowly(size: int) -> None:
    mask = face_mask(size, template_for(size)).astype(np.float64)
    upper = mask[: size // 2]  # below the mouth the crop leaves less room
    for axis in (0, 1):
        assert np.abs(np.diff(upper, axis=axis)).max() < 0.2 * 64 / size + 0.05


@pytest.mark.parametrize("size", SIZES)
def test_recovery_covers_protection_and_a_pixel_more(size: int) -> None:
    template = template_for(size)
    protected = np.pad(face_mask(size, template) > 0, 1)
    grown = np.zeros((size, size), bool)
    for dy in range(3):
        for dx in range(3):
            grown |= protected[dy : dy + size, dx : dx + size]
    assert (recovery_mask(size, template)[grown] == 1.0).all()


def landmarks_turned(size: int, nose: float) -> np.ndarray:
    """The template's landmarks with the nose so many eye distances beside its place."""
    points = template_for(size)
    points[2, 0] += nose * (points[1, 0] - points[0, 0])
    return points


def reach(mask: np.ndarray, template: np.ndarray) -> tuple[float, float]:
    """How far a mask goes left and right of the eyes' middle, along the line of the nose."""
    row = np.flatnonzero(mask[round(template[2, 1])] > 0.5)
    middle = float(template[:2, 0].mean())
    return middle - row[0], row[-1] - middle


def test_a_head_to_the_front_is_masked_to_both_cheeks() -> None:
    template = template_for(128)
    whole, fitted = face_mask(128, template), fitted_mask(128, template, template)
    np.testing.assert_allclose(fitted, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_far_cheek_ends_a_turned_head(size: int) -> None:
    """The farther it turns, the nearer to the far eye; the near half stays."""
    template = template_for(size)
    between = template[1, 0] - template[0, 0]
    frontal = reach(fitted_mask(size, template, template), template)
    last = frontal[1]
    for nose in (0.1, 0.25, 0.5):
        near, far = reach(fitted_mask(size, template, landmarks_turned(size, nose)), template)
        assert near == frontal[0]
        assert far <= last
        last = far
        other = reach(fitted_mask(size, template, landmarks_turned(size, -nose)), template)
        np.testing.assert_allclose(other, (far, near), atol=1.5)
    assert 0.5 * between <= last < 0.8 * between  # the far eye is inside, background is not
    assert reach(fitted_mask(size, template, landmarks_turned(size, 30.0)), template)[1] > 0


@given(
    points=st.lists(st.tuples(st.floats(-300, 300), st.floats(-300, 300)), min_size=5, max_size=5),
    size=st.sampled_from([32, 64, 128]),
)
def test_whatever_the_landmarks_recovery_covers_the_mask(
    points: list[tuple[float, float]], size: int
) -> None:
    """A key recovers what its photo lost, though it does not say which mask was used."""
    template = template_for(size)
    mask = fitted_mask(size, template, points)
    assert np.isfinite(mask).all()
    assert mask.min() >= 0.0
    assert (mask <= face_mask(size, template) + 1e-6).all()
    assert (recovery_mask(size, template)[mask > 0] == 1.0).all()


def test_landmarks_that_are_none_are_refused() -> None:
    template = template_for(64)
    for wrong in (template[:4], template * np.nan, template[None], template + np.inf):
        with pytest.raises(OptionError, match="landmarks"):
            fitted_mask(64, template, wrong)


def test_masks_follow_another_template() -> None:
    template = template_for(128) * 0.8 + 12.0
    assert face_mask(128, template).sum() < 0.8 * face_mask(128, template_for(128)).sum()


def test_latent_mask_is_the_mean_over_cells() -> None:
    mask = np.random.default_rng(5).random((32, 32), dtype=np.float32)
    latent = latent_mask(mask, 4)
    assert latent.dtype == np.float32
    for row in range(4):
        for column in range(4):
            cell = mask[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].astype(np.float64)
            np.testing.assert_allclose(latent[row, column], cell.mean(), rtol=1e-6)
    for size in (0, 5):
        with pytest.raises(OptionError, match="divide"):
            latent_mask(mask, size)
