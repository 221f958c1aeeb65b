"""Alignment and pasting against closed forms on smooth synthetic photos."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from diffveil import align
from diffveil.align import (
    ARCFACE_TEMPLATE,
    crop_face,
    paste_face,
    paste_faces,
    similarity,
    template_for,
)
from diffveil.errors import OptionError
from diffveil.masks import face_mask, fitted_mask, recovery_mask

SIZE = 64
TEMPLATE = template_for(SIZE)
MASK = face_mask(SIZE, TEMPLATE)
RECOVERY = recovery_mask(SIZE, TEMPLATE)

Matrix = NDArray[np.float64]
Pixels = NDArray[np.uint8]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def turned(scale: float, degrees: float, centre: tuple[float, float], size: int = SIZE) -> Matrix:
    """Photo to crop: the crop's middle shows `centre`; `scale` crop pixels a photo pixel."""
    angle = math.radians(degrees)
    linear = scale * np.array(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    return np.concatenate([linear, ((size - 1) / 2 - linear @ np.array(centre))[:, None]], axis=1)


def waves(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """A smooth picture, defined everywhere, [..., 3], 0 … 255."""
    channels = [np.sin(x / 17 + k) * np.cos(y / (19 + k)) for k in range(3)]
    return 127.5 + 100 * np.stack(channels, axis=-1)


def photo_of(height: int, width: int) -> Pixels:
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    return np.rint(waves(x, y)).astype(np.uint8)


def seen_by(matrix: Matrix, size: int = SIZE) -> NDArray[np.float64]:
    """What a perfect crop of `waves` holds."""
    linear = np.linalg.inv(matrix[:, :2])
    v, u = np.mgrid[0:size, 0:size].astype(np.float64)
    x, y = np.einsum("ij,j...->i...", linear, np.stack([u - matrix[0, 2], v - matrix[1, 2]]))
    return waves(x, y)


# --- similarity ---------------------------------------------------------------------------------


def test_similarity_is_the_least_squares_optimum(rng: np.random.Generator) -> None:
    for _ in range(20):
        source, target = rng.normal(50, 20, (2, 5, 2))
        target = source @ np.array([[0.8, 0.3], [-0.3, 0.8]]) + 4 + 0.1 * (target - 50)
        # u = a·x − b·y + c, v = b·x + a·y + d is linear in (a, b, c, d).
        x, y = source.T
        ones, zeros = np.ones(5), np.zeros(5)
        system = np.concatenate(
            [np.stack([x, -y, ones, zeros], 1), np.stack([y, x, zeros, ones], 1)]
        )
        a, b, c, d = np.linalg.lstsq(system, target.T.ravel(), rcond=None)[0]
        np.testing.assert_allclose(
            similarity(source, target), [[a, -b, c], [b, a, d]], rtol=1e-9, atol=1e-9
        )


def test_similarity_never_mirrors() -> None:
    mirrored = np.array(ARCFACE_TEMPLATE) * [-1, 1]
    matrix = similarity(mirrored, ARCFACE_TEMPLATE)
    assert np.linalg.det(matrix[:, :2]) > 0


@pytest.mark.parametrize(
    "landmarks",
    [
        np.zeros((5, 2)),
        np.full((5, 2), 17.3),
        np.full((5, 2), np.nan),
        np.ones((4, 2)),
        np.ones((5, 3)),
        np.ones(10),
    ],
)
def test_degenerate_landmarks(landmarks: NDArray[np.float64]) -> None:
    with pytest.raises(OptionError, match="landmarks"):
        similarity(landmarks, TEMPLATE)


def test_template_of_128_is_arcface_with_a_margin_of_8() -> None:
    np.testing.assert_allclose(template_for(128), np.array(ARCFACE_TEMPLATE) + 8)


@pytest.mark.parametrize("size", [32, 256])
def test_templates_of_all_sizes_show_the_same_part(size: int) -> None:
    corners = (template_for(size) + 0.5) / size
    np.testing.assert_allclose(corners, (template_for(128) + 0.5) / 128, rtol=1e-12)


# --- cropping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0.0, 30.0, -100.0, 180.0])
@pytest.mark.parametrize("scale", [0.3, 0.5, 0.9, 1.0, 1.7, 3.0])
def test_crop_matches_the_picture_it_samples(scale: float, degrees: float) -> None:
    photo = photo_of(400, 420)
    matrix = turned(scale, degrees, (205.3, 198.8))
    crop = crop_face(photo, matrix, SIZE)
    error = crop - seen_by(matrix)
    # Three roundings to 8 bits with bicubic overshoot; reduced crops also flatten the waves' tops.
    assert np.abs(error).max() < (2.5 if scale >= 0.9 else 4.0)
    assert abs(error.mean()) < 0.2  # rounded, not truncated


def test_crop_is_exact_where_it_only_shifts(rng: np.random.Generator) -> None:
    photo = rng.integers(0, 256, (90, 100, 3), dtype=np.uint8)
    matrix = np.array([[1.0, 0.0, -13.0], [0.0, 1.0, -9.0]])
    np.testing.assert_array_equal(crop_face(photo, matrix, SIZE), photo[9:73, 13:77])


def test_crop_repeats_the_border_outside(rng: np.random.Generator) -> None:
    photo = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    matrix = np.array([[1.0, 0.0, 20.0], [0.0, 1.0, 30.0]])
    rows = np.clip(np.arange(SIZE) - 30, 0, 39)
    columns = np.clip(np.arange(SIZE) - 20, 0, 49)
    np.testing.assert_array_equal(crop_face(photo, matrix, SIZE), photo[rows[:, None], columns])


def test_crop_does_not_alias() -> None:
    checkers = np.indices((512, 512)).sum(0) % 2 * 255
    photo = np.repeat(checkers[..., None], 3, axis=2).astype(np.uint8)
    crop = crop_face(photo, turned(0.2, 20.0, (256, 256)), SIZE).astype(np.float64)
    assert abs(crop.mean() - 127.5) < 2
    assert crop.std() < 8  # 127.5 without a filter


def test_faces_far_outside_are_refused() -> None:
    photo = photo_of(60, 60)
    for centre in ((1e5, 30.0), (30.0, -1e5), (1e15, 1e15)):
        with pytest.raises(OptionError, match="outside"):
            crop_face(photo, turned(1.0, 0.0, centre), SIZE)
    with pytest.raises(OptionError, match="outside"):
        crop_face(photo, turned(1e-4, 0.0, (30, 30)), SIZE)
    for matrix in (np.zeros((2, 3)), np.full((2, 3), np.nan), np.eye(3)):
        with pytest.raises(OptionError, match="matrix"):
            crop_face(photo, matrix, SIZE)


# --- pasting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0.0, 25.0, 170.0])
@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_pasting_what_was_cut_changes_nothing_to_see(scale: float, degrees: float) -> None:
    photo = photo_of(300, 310)
    matrix = turned(scale, degrees, (151.2, 148.9))
    pasted = paste_face(photo, crop_face(photo, matrix, SIZE), matrix, MASK)
    assert np.abs(pasted.astype(int) - photo).max() <= (2 if scale >= 1 else 6)


@pytest.mark.parametrize("scale", [0.4, 1.0, 4.0])
def test_only_the_mask_changes(rng: np.random.Generator, scale: float) -> None:
    photo = rng.integers(0, 256, (300, 310, 3), dtype=np.uint8)
    before = photo.copy()
    matrix = turned(scale, 40.0, (150, 150))
    crop = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    pasted = paste_face(photo, crop, matrix, MASK)
    np.testing.assert_array_equal(photo, before)
    y, x = np.mgrid[0:300, 0:310]
    points = matrix[:, :2] @ np.stack([x.ravel(), y.ravel()]) + matrix[:, 2:]
    u, v = np.rint(points).astype(int).clip(-1, SIZE).reshape(2, 300, 310)
    support = np.pad(MASK > 0, 3)
    grown = np.zeros_like(support)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            grown |= np.roll(support, (dy, dx), (0, 1))
    outside = ~grown[v + 3, u + 3]
    np.testing.assert_array_equal(pasted[outside], photo[outside])
    assert (pasted != photo).any()


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(0.2, 8.0),
    degrees=st.floats(-180, 180),
    x=st.floats(-20, 140),
    y=st.floats(-20, 120),
    seed=st.integers(0, 2**32 - 1),
)
def test_nothing_of_a_protected_face_stays_after_recovery(
    scale: float, degrees: float, x: float, y: float, seed: int
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    photo = np.full((100, 120, 3), 90, np.uint8)
    matrix = turned(scale, degrees, (x, y))
    protected = paste_face(photo, noise, matrix, MASK, match_colour=False)
    original = np.full((SIZE, SIZE, 3), 90, np.uint8)
    recovered = paste_face(protected, original, matrix, RECOVERY, match_colour=False)
    np.testing.assert_array_equal(recovered, photo)


def test_a_slightly_darker_crop_leaves_no_seam() -> None:
    photo = photo_of(200, 200)
    matrix = turned(0.8, 10.0, (100, 100))
    crop = np.clip(crop_face(photo, matrix, SIZE).astype(int) - [8, 2, -5], 0, 255)
    plain = paste_face(photo, crop.astype(np.uint8), matrix, MASK, match_colour=False)
    matched = paste_face(photo, crop.astype(np.uint8), matrix, MASK)
    assert np.abs(plain.astype(int) - photo).max() >= 8
    assert np.abs(matched.astype(int) - photo).max() <= 4


def test_colour_correction_is_bounded() -> None:
    photo = np.full((100, 100, 3), 200, np.uint8)
    black = np.zeros((SIZE, SIZE, 3), np.uint8)
    matched = paste_face(photo, black, turned(1.0, 0.0, (50, 50)), MASK)
    assert matched[45:55, 45:55].max() <= 16


def overlapping() -> tuple[Pixels, list[Pixels], list[Matrix]]:
    photo = np.full((120, 160, 3), 128, np.uint8)
    red, green = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    red[..., 0] = green[..., 1] = 255
    return photo, [red, green], [turned(1, 0, (65, 60)), turned(1, 15, (95, 60))]


def test_each_face_keeps_its_own_side_of_an_overlap() -> None:
    photo, crops, matrices = overlapping()
    pasted = paste_faces(photo, crops, matrices, MASK, match_colour=False)
    np.testing.assert_array_equal(pasted[60, 60], [255, 0, 0])
    np.testing.assert_array_equal(pasted[60, 100], [0, 255, 0])
    # Where both masks are full, nothing of the photo shows through the border between them.
    alone = [
        paste_faces(photo, [np.full_like(crops[0], 255)], [m], MASK, match_colour=False)
        for m in matrices
    ]
    both = (alone[0] == 255).all(-1) & (alone[1] == 255).all(-1)
    assert both.any()
    assert (pasted[both].astype(int).sum(axis=-1) <= 256).all()
    assert (pasted[both][:, 2] == 0).all()


def test_order_of_faces_does_not_matter() -> None:
    photo, crops, matrices = overlapping()
    one = paste_faces(photo, crops, matrices, MASK)
    other = paste_faces(photo, crops[::-1], matrices[::-1], MASK)
    np.testing.assert_array_equal(one, other)


def test_faces_apart_are_pasted_as_if_alone(rng: np.random.Generator) -> None:
    photo = photo_of(120, 260)
    crops = list(rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8))
    matrices = [turned(1, 5, (60, 60)), turned(1.1, -9, (200, 60))]
    together = paste_faces(photo, crops, matrices, MASK)
    one_by_one = photo
    for crop, matrix in zip(crops, matrices, strict=True):
        one_by_one = paste_face(one_by_one, crop, matrix, MASK)
    np.testing.assert_array_equal(together, one_by_one)


def test_each_face_has_the_mask_that_is_its_own(rng: np.random.Generator) -> None:
    photo = photo_of(120, 260)
    crops = list(rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8))
    matrices = [turned(1, 5, (60, 60)), turned(1.1, -9, (200, 60))]
    aside = np.asarray(TEMPLATE).copy()
    aside[2, 0] += 12.0
    masks = np.stack([MASK, fitted_mask(SIZE, TEMPLATE, aside)])
    together = paste_faces(photo, crops, matrices, masks)
    one_by_one = photo
    for crop, matrix, mask in zip(crops, matrices, masks, strict=True):
        one_by_one = paste_face(one_by_one, crop, matrix, mask)
    np.testing.assert_array_equal(together, one_by_one)
    with pytest.raises(OptionError, match=r"mask: float32 \[2, .* or \[F, S, S\]"):
        paste_faces(photo, crops[:1], matrices[:1], masks)


def test_large_faces_are_pasted_in_bands_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    for photo, crops, matrices in (
        overlapping(),
        (photo_of(120, 160), [photo_of(SIZE, SIZE)], [turned(0.7, 20, (80, 60))]),
    ):
        monkeypatch.setattr(align, "_BAND_PIXELS", 2**30)
        whole = paste_faces(photo, crops, matrices, MASK)
        monkeypatch.setattr(align, "_BAND_PIXELS", 500)  # a few rows
        banded = paste_faces(photo, crops, matrices, MASK)
        # One rounding of coordinates apart.
        assert np.abs(banded.astype(int) - whole).max() <= 1


def test_pasting_a_large_face_takes_little_memory() -> None:
    photo = np.full((1600, 1600, 3), 128, np.uint8)
    crop = np.full((SIZE, SIZE, 3), 100, np.uint8)
    matrix = turned(SIZE / 1600, 0.0, (800, 800))
    tracemalloc.start()
    try:
        paste_face(photo, crop, matrix, MASK, match_colour=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The result, and some arrays of one band; the whole face at once would take far more.
    assert peak < photo.nbytes + 90 * align._BAND_PIXELS


def test_faces_off_the_photo_change_nothing() -> None:
    photo = photo_of(50, 50)
    crop = np.zeros((SIZE, SIZE, 3), np.uint8)
    pasted = paste_face(photo, crop, turned(1, 0, (200, 200)), MASK)
    np.testing.assert_array_equal(pasted, photo)
    np.testing.assert_array_equal(paste_faces(photo, [], [], MASK), photo)


def test_mismatching_shapes_are_all_reported() -> None:
    photo = photo_of(50, 50)
    with pytest.raises(OptionError, match=r"pixels.*mask.*2 crops but 1 matrices.*crop 0"):
        paste_faces(
            photo.astype(np.float32),  # type: ignore[arg-type]
            [photo, photo],
            [turned(1, 0, (25, 25))],
            MASK[:-1],
        )
