"""Where faces lie, worked out on the host: the tables that face kernels read.

Coordinates are pixels with the centre of the first pixel at (0, 0). A face's matrix is float64
[2, 3] and maps photo to crop. Photos are uint8 [H, W, 3] one after the other in one buffer, and
faces come photo by photo. Sampling takes two steps, as in `diffveil.align`: an image is reduced to
about the resolution that is asked for, with an antialiasing filter along its axes, and the reduced
image is then sampled through an affine map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffveil_kernels.errors import KernelInputError

__all__ = ["FaceTable", "Integer", "Number", "crop_table", "paste_table"]

Matrix = NDArray[np.float64]

_MAX_REACH = 8.0  # a crop may reach this many times the photo's longer side, no further
_CUBIC_SUPPORT = 2.0


class Integer:
    """Columns of `FaceTable.integers`; lengths are pixels, strides and offsets elements."""

    SOURCE = 0  # first element of the image that is reduced
    ROW, COLUMN, CHANNEL = 1, 2, 3  # its strides
    HEIGHT, WIDTH = 4, 5  # its size; beyond, the border repeats
    X0, Y0 = 6, 7  # first pixel of the region that is reduced
    REGION_WIDTH, REGION_HEIGHT = 8, 9
    REDUCED_WIDTH, REDUCED_HEIGHT = 10, 11
    TAPS_X, TAPS_Y = 12, 13  # most pixels that one reduced pixel is made of, along an axis
    # For pasting only:
    PHOTO = 14  # first element of the photo
    PHOTO_WIDTH = 15
    LEFT, TOP, RIGHT, BOTTOM = 16, 17, 18, 19  # the photo's pixels that a face may change
    FIRST, LAST = 20, 21  # faces of the same photo
    COUNT = 22


class Number:
    """Columns of `FaceTable.numbers`."""

    SCALE_X, SCALE_Y = 0, 1  # pixels of the region to a reduced pixel
    SUPPORT_X, SUPPORT_Y = 2, 3  # half the filter's width, pixels of the region
    SAMPLE = 4  # 4 … 9: output pixel to reduced pixel, a matrix by rows
    # For pasting only:
    PLACE = 10  # 10 … 15: photo to crop, a matrix by rows
    MIDDLE_U, MIDDLE_V, EXTENT_U, EXTENT_V = 16, 17, 18, 19  # of the mask
    COUNT = 20


@dataclass(frozen=True)
class FaceTable:
    """What face kernels need to know of N faces.

    Attributes:
        integers: int64 [N, 22], columns of `Integer`.
        numbers: float64 [N, 20], columns of `Number`.
        size: Side of a crop, pixels.
        capacity: Pixels of the largest reduced image.
        box: Pixels of the largest area that a face may change; zero for a table of crops.
        elements: Length of the buffer of photos.
    """

    integers: NDArray[np.int64]
    numbers: NDArray[np.float64]
    size: int
    capacity: int
    box: int
    elements: int

    def __len__(self) -> int:
        return len(self.integers)


def crop_table(
    photos: Sequence[tuple[int, int]],
    owners: Sequence[int],
    matrices: Sequence[Matrix],
    size: int,
) -> FaceTable:
    """The table for cutting faces out.

    Args:
        photos: Height and width of each photo.
        owners: Number of each face's photo, in ascending order.
        matrices: float64 [2, 3] each, photo to crop.
        size: Side of a crop in pixels.

    Raises:
        KernelInputError: Numbers do not fit together, or a face lies far outside its photo.
    """
    offsets, elements = _offsets(photos)
    _check_faces(len(photos), owners, matrices, size)
    integers = np.zeros((len(matrices), Integer.COUNT), dtype=np.int64)
    numbers = np.zeros((len(matrices), Number.COUNT), dtype=np.float64)
    for row, values, owner, matrix in zip(integers, numbers, owners, matrices, strict=True):
        height, width = photos[owner]
        inverse = _inverse(matrix)
        x0, y0, x1, y1 = _bounds(inverse, size, margin=4)
        reach = _MAX_REACH * max(width, height) + 64
        if max(-x0, -y0, x1 - width, y1 - height) > reach:
            raise KernelInputError("face: it lies far outside its photo")
        row[[Integer.SOURCE, Integer.ROW, Integer.COLUMN, Integer.CHANNEL]] = (
            *(offsets[owner], 3 * width),
            *(3, 1),
        )
        row[[Integer.HEIGHT, Integer.WIDTH, Integer.X0, Integer.Y0]] = height, width, x0, y0
        inverse[:, 2] -= (x0, y0)
        _reduce(row, values, (x1 - x0, y1 - y0), inverse)
    return FaceTable(integers, numbers, size, _capacity(integers), 0, elements)


def paste_table(
    photos: Sequence[tuple[int, int]],
    owners: Sequence[int],
    matrices: Sequence[Matrix],
    mask: NDArray[np.float32],
) -> FaceTable:
    """The table for putting faces back.

    Args:
        photos: Height and width of each photo.
        owners: Number of each face's photo, in ascending order.
        matrices: float64 [2, 3] each, photo to crop.
        mask: float32 [S, S], 0 … 1, the same for all faces; 0 along its border.

    Raises:
        KernelInputError: Numbers do not fit together.
    """
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or mask.dtype != np.float32:
        raise KernelInputError(f"mask: {mask.dtype} {list(mask.shape)}, expected float32 [S, S]")
    offsets, elements = _offsets(photos)
    size = mask.shape[0]
    _check_faces(len(photos), owners, matrices, size)
    integers = np.zeros((len(matrices), Integer.COUNT), dtype=np.int64)
    numbers = np.zeros((len(matrices), Number.COUNT), dtype=np.float64)
    support = _support(mask)
    box = 0
    for face, (owner, matrix) in enumerate(zip(owners, matrices, strict=True)):
        row, values = integers[face], numbers[face]
        height, width = photos[owner]
        row[[Integer.SOURCE, Integer.ROW, Integer.COLUMN, Integer.CHANNEL]] = (
            *(face * 3 * size * size, size),
            *(1, size * size),
        )
        row[[Integer.HEIGHT, Integer.WIDTH]] = size
        _reduce(row, values, (size, size), matrix.copy())
        x0, y0, x1, y1 = _bounds(_inverse(matrix), size, margin=1)
        left, top = min(max(x0, 0), width), min(max(y0, 0), height)
        right, bottom = max(min(x1, width), left), max(min(y1, height), top)
        row[[Integer.PHOTO, Integer.PHOTO_WIDTH]] = offsets[owner], width
        row[Integer.LEFT : Integer.BOTTOM + 1] = left, top, right, bottom
        row[Integer.FIRST] = np.searchsorted(owners, owner, side="left")
        row[Integer.LAST] = np.searchsorted(owners, owner, side="right")
        values[Number.PLACE : Number.PLACE + 6] = matrix.ravel()
        values[Number.MIDDLE_U :] = support
        box = max(box, (right - left) * (bottom - top))
    return FaceTable(integers, numbers, size, _capacity(integers), box, elements)


def _reduce(
    row: NDArray[np.int64], values: NDArray[np.float64], region: tuple[int, int], matrix: Matrix
) -> None:
    """Fill in how a region (width, height) is reduced, and how the result is sampled.

    Args:
        row: Of `FaceTable.integers`.
        values: Of `FaceTable.numbers`.
        region: Width and height of the region.
        matrix: Output pixel to pixel of the region; changed.
    """
    shrink = math.sqrt(abs(float(np.linalg.det(matrix[:, :2]))))  # region pixels an output pixel
    for axis, side in enumerate(region):
        reduced = max(1, round(side / shrink)) if shrink > 1.0 else side
        factor, scale = reduced / side, side / reduced
        # Without reduction a pixel is itself; with it, Keys' cubic over two reduced pixels.
        support = _CUBIC_SUPPORT * scale if reduced != side else 0.5
        row[Integer.REGION_WIDTH + axis] = side
        row[Integer.REDUCED_WIDTH + axis] = reduced
        row[Integer.TAPS_X + axis] = math.floor(2.0 * support) + 2 if reduced != side else 1
        values[Number.SCALE_X + axis] = scale
        values[Number.SUPPORT_X + axis] = support
        matrix[axis] *= factor
        matrix[axis, 2] += 0.5 * factor - 0.5  # pixel centres: x' + ½ = factor · (x + ½)
    values[Number.SAMPLE : Number.SAMPLE + 6] = matrix.ravel()


def _capacity(integers: NDArray[np.int64]) -> int:
    areas = integers[:, Integer.REDUCED_WIDTH] * integers[:, Integer.REDUCED_HEIGHT]
    return int(areas.max(initial=0))


def _offsets(photos: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Where each photo begins, and where the last one ends."""
    if any(height < 1 or width < 1 for height, width in photos):
        raise KernelInputError("photos: one has no pixels")
    ends = np.cumsum([0, *(3 * height * width for height, width in photos)]).tolist()
    return ends[:-1], ends[-1]


def _check_faces(photos: int, owners: Sequence[int], matrices: Sequence[Matrix], size: int) -> None:
    if len(owners) != len(matrices):
        raise KernelInputError(f"{len(owners)} owners but {len(matrices)} matrices")
    if list(owners) != sorted(owners) or any(not 0 <= owner < photos for owner in owners):
        raise KernelInputError(f"owners: expected numbers of {photos} photos in ascending order")
    if size < 1:
        raise KernelInputError(f"size: received {size}, expected at least 1")


def _inverse(matrix: Matrix) -> Matrix:
    """The affine map in the other direction."""
    if matrix.shape != (2, 3) or not np.isfinite(matrix).all():
        raise KernelInputError(f"matrix: received {list(matrix.shape)}, expected finite [2, 3]")
    if abs(float(np.linalg.det(matrix[:, :2]))) < 1e-12:
        raise KernelInputError("matrix: not invertible")
    linear = np.linalg.inv(matrix[:, :2])
    return np.concatenate([linear, -linear @ matrix[:, 2:]], axis=1)


def _bounds(inverse: Matrix, size: int, margin: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 (past the end) of the photo's pixels that a crop and a margin cover."""
    corners = np.array([[u, v, 1.0] for u in (-1.0, float(size)) for v in (-1.0, float(size))])
    points = corners @ inverse.T
    low = np.floor(points.min(axis=0)).astype(int) - margin
    high = np.ceil(points.max(axis=0)).astype(int) + margin + 1
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _support(mask: NDArray[np.float32]) -> tuple[float, float, float, float]:
    """Middle (u, v) and half extents (u, v) of the area where a mask is above zero."""
    v, u = np.nonzero(mask > 0)
    if not len(u):
        middle, extent = (mask.shape[0] - 1) / 2.0, mask.shape[0] / 2.0
        return middle, middle, extent, extent
    low, high = (float(u.min()), float(v.min())), (float(u.max()), float(v.max()))
    return (
        *((low[0] + high[0]) / 2.0, (low[1] + high[1]) / 2.0),
        *((high[0] - low[0] + 1.0) / 2.0, (high[1] - low[1] + 1.0) / 2.0),
    )
