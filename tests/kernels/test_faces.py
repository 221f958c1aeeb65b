"""`face_crop` and `face_paste`, interpreted, against the runtime's own way through Pillow.

Tolerances are grey levels of 255. They come from where each side rounds: both round to 8 bits
after every pass of a reduction, the kernels' sums before that are float32, the references'
float64, Pillow's 22 bits of fixed point.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffveil import align
from diffveil.errors import OptionError
from diffveil.scenes import to_images
from diffveil_kernels.errors import KernelInputError
from diffveil_kernels.geometry import Integer, crop_table, paste_table
from diffveil_kernels.jit import ops
from diffveil_kernels.reference import faces as reference

SIZE = 24
MASK = align.face_mask(SIZE, align.template_for(SIZE))

Matrix = NDArray[np.float64]
Pixels = NDArray[np.uint8]

pytestmark = pytest.mark.usefixtures("few_programs")


def turned(scale: float, degrees: float, centre: tuple[float, float], size: int = SIZE) -> Matrix:
    """Photo to crop: the crop's middle shows `centre`; `scale` crop pixels a photo pixel."""
    angle = math.radians(degrees)
    linear = scale * np.array(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    return np.concatenate([linear, ((size - 1) / 2 - linear @ np.array(centre))[:, None]], axis=1)


def photo_of(height: int, width: int, seed: int) -> Pixels:
    """Noise over waves, and an edge: detail at every scale."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [np.sin(x / (7 + k)) * np.cos(y / (9 - k)) for k in range(3)]
    levels = 127.5 + 70 * np.stack(channels, -1) + 40 * (x > y)[..., None]
    return np.clip(levels + rng.normal(0, 20, levels.shape), 0, 255).astype(np.uint8)


def flat(photos: list[Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([photo.reshape(-1) for photo in photos]))


def levels_apart(a: NDArray[np.generic], b: NDArray[np.generic]) -> tuple[float, float]:
    """Largest and mean difference."""
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(difference.max()), float(difference.mean())


# --- crops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_crops_of_several_photos_are_the_runtimes(dtype: str) -> None:
    photos = [photo_of(37, 53, 0), photo_of(61, 40, 1)]
    # Enlarged, as it is, reduced, and over the border of the photo.
    faces = [
        (0, turned(1.7, 20, (25.0, 17.0))),
        (0, turned(1.0, 0, (24.5, 18.5))),
        (1, turned(0.45, -75, (20.0, 30.0))),
        (1, turned(0.8, 190, (3.0, 55.0))),
    ]
    owners, matrices = [owner for owner, _ in faces], [matrix for _, matrix in faces]
    table = crop_table([photo.shape[:2] for photo in photos], owners, matrices, SIZE)
    actual = ops.face_crop(flat(photos), table, dtype).numpy()
    expected = to_images(np.stack([align.crop_face(photos[o], m, SIZE) for o, m in faces]))
    assert actual.dtype == np.dtype(dtype)
    assert actual.shape == (4, 3, SIZE, SIZE)
    largest, mean = levels_apart(127.5 * actual.astype(np.float64), 127.5 * expected)
    assert largest < 1.1  # a level where a sum lies between two, and half precision's own rounding
    assert mean < 0.04
    # Where nothing is reduced, ties apart, the bits are the same.
    if dtype == "float32":
        assert (actual[:2] == expected[:2]).mean() > 0.999
    for plain in (
        reference.face_crop(flat(photos).numpy(), table, dtype),
        reference.face_crop(flat(photos), table, dtype).numpy(),
    ):
        assert plain.dtype == np.dtype(dtype)
        assert levels_apart(127.5 * plain, 127.5 * actual.astype(np.float64))[0] < 1.1


def test_strong_reductions_differ_by_what_pillow_leaves_out() -> None:
    """Beyond six photo pixels to a crop pixel Pillow averages boxes first, to save time."""
    photo = photo_of(150, 170, 2)
    size, matrix = 12, turned(0.12, 30, (85.0, 75.0), 12)
    table = crop_table([photo.shape[:2]], [0], [matrix], size)
    actual = 127.5 * (ops.face_crop(flat([photo]), table).numpy() + 1.0)
    plain = 127.5 * (reference.face_crop(photo.reshape(-1), table) + 1.0)
    assert levels_apart(actual, plain)[0] < 1.1
    runtime = align.crop_face(photo, matrix, size).transpose(2, 0, 1)[None]
    largest, mean = levels_apart(actual, runtime)
    assert largest < 4.1
    assert mean < 0.8


def test_crops_far_outside_are_refused_as_the_runtime_refuses_them() -> None:
    photo = photo_of(20, 30, 3)
    for x in (15.0, 300.0, 1e6):
        matrix = turned(1.0, 0, (x, 10.0))
        try:
            align.crop_face(photo, matrix, SIZE)
        except OptionError:
            with pytest.raises(KernelInputError, match="far outside"):
                crop_table([photo.shape[:2]], [0], [matrix], SIZE)
        else:
            assert len(crop_table([photo.shape[:2]], [0], [matrix], SIZE)) == 1


# --- pastes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pastes_into_several_photos_are_the_runtimes(dtype: str) -> None:
    photos = [photo_of(40, 61, 4), photo_of(45, 44, 5)]
    # Two that overlap, one over the border, one larger than its crop, one wholly outside.
    faces = [
        (0, turned(1.1, 10, (20.0, 18.0))),
        (0, turned(0.9, -25, (32.0, 22.0))),
        (0, turned(1.6, 80, (58.0, 37.0))),
        (1, turned(0.7, 200, (21.0, 20.0))),
        (1, turned(1.0, 0, (400.0, 20.0))),
    ]
    owners, matrices = [owner for owner, _ in faces], [matrix for _, matrix in faces]
    crops = np.stack([photo_of(SIZE, SIZE, 6 + k) for k in range(len(faces))])
    images = torch.from_numpy(to_images(crops)).to(getattr(torch, dtype))
    table = paste_table([photo.shape[:2] for photo in photos], owners, matrices, MASK)
    before = flat(photos)
    actual = ops.face_paste(before, images, torch.from_numpy(MASK), table).numpy()
    np.testing.assert_array_equal(before.numpy(), flat(photos).numpy())
    expected = np.concatenate(
        [
            align.paste_faces(
                photo,
                [crops[k] for k, owner in enumerate(owners) if owner == number],
                [matrix for owner, matrix in faces if owner == number],
                MASK,
                match_colour=False,
            ).reshape(-1)
            for number, photo in enumerate(photos)
        ]
    )
    largest, mean = levels_apart(actual, expected)
    # Half precision tells all levels of a crop apart.
    assert largest <= 1
    assert mean < 0.01
    assert levels_apart(actual, flat(photos).numpy())[0] > 50  # the faces are there
    untouched = expected == flat(photos).numpy()
    assert levels_apart(actual[untouched], expected[untouched])[0] <= 1
    for plain in (
        reference.face_paste(before.numpy(), images.numpy(), MASK, table),
        reference.face_paste(before, images, torch.from_numpy(MASK), table).numpy(),
    ):
        assert levels_apart(actual, plain)[0] <= 1


def test_outside_the_masks_not_a_bit_changes() -> None:
    photo = photo_of(50, 50, 7)
    matrix = turned(1.0, 33, (25.0, 25.0))
    table = paste_table([(50, 50)], [0], [matrix], MASK)
    white, black = torch.ones(1, 3, SIZE, SIZE), -torch.ones(1, 3, SIZE, SIZE)
    mask = torch.from_numpy(MASK)
    lit, dark = (ops.face_paste(flat([photo]), crop, mask, table) for crop in (white, black))
    unchanged = (lit == dark).numpy().reshape(photo.shape)
    np.testing.assert_array_equal(lit.numpy().reshape(photo.shape)[unchanged], photo[unchanged])
    x, y = np.meshgrid(np.arange(50.0), np.arange(50.0))
    u, v = np.einsum("ij,j...->i...", matrix[:, :2], np.stack([x, y])) + matrix[:, 2, None, None]
    far = (u < -1) | (u > SIZE) | (v < -1) | (v > SIZE)
    assert unchanged.all(axis=-1)[far].all()
    assert not unchanged.all()


def test_the_order_of_faces_does_not_matter() -> None:
    photo = photo_of(40, 50, 8)
    matrices = [turned(1.0, 10, (18.0, 20.0)), turned(1.2, -20, (28.0, 22.0))]
    images = torch.from_numpy(to_images(np.stack([photo_of(SIZE, SIZE, k) for k in (9, 10)])))
    results = []
    for order in ([0, 1], [1, 0]):
        table = paste_table([(40, 50)], [0, 0], [matrices[k] for k in order], MASK)
        pasted = ops.face_paste(flat([photo]), images[order], torch.from_numpy(MASK), table)
        results.append(pasted.numpy())
    assert levels_apart(*results)[0] <= 1


def test_tables_and_misfits() -> None:
    matrix = turned(1.0, 0, (10.0, 10.0))
    table = crop_table([(20, 30), (7, 9)], [1], [matrix], 8)
    assert table.elements == 3 * (20 * 30 + 7 * 9)
    assert table.integers[0, Integer.SOURCE] == 3 * 20 * 30
    assert len(crop_table([(20, 30)], [], [], 8)) == 0
    refused = [
        ([(20, 30)], [1], [matrix], 8, "owners"),
        ([(20, 30)] * 2, [1, 0], [matrix] * 2, 8, "ascending"),
        ([(20, 30)], [0], [], 8, "1 owners but 0 matrices"),
        ([(0, 30)], [0], [matrix], 8, "no pixels"),
        ([(20, 30)], [0], [matrix], 0, "size"),
        ([(20, 30)], [0], [matrix * np.nan], 8, "finite"),
        ([(20, 30)], [0], [matrix * 0.0], 8, "invertible"),
    ]
    for photos, owners, matrices, size, message in refused:
        with pytest.raises(KernelInputError, match=message):
            crop_table(photos, owners, matrices, size)
    with pytest.raises(KernelInputError, match="mask"):
        paste_table([(20, 30)], [0], [matrix], MASK.astype(np.float64))
    with pytest.raises(KernelInputError, match="photos"):
        ops.face_crop(torch.zeros(5, dtype=torch.uint8), table)
    pasting = paste_table([(20, 30)], [0], [matrix], MASK)
    with pytest.raises(KernelInputError, match="crops: received"):
        ops.face_paste(
            torch.zeros(1800, dtype=torch.uint8),
            torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64),
            torch.from_numpy(MASK),
            pasting,
        )
