"""Frames of faces on a coarse grid, so that they can be found again from another face.

A face that carries another can be read only in the very frame that it was drawn in. A detector that
looks at the new face gives back that frame but for a few pixels; on a grid much coarser than these,
it gives back exactly that frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Frame"]

_Matrix: TypeAlias = NDArray[np.float64]

_SHIFT = 1 / 12  # of the crop's side, between neighbouring frames
_SCALE = 1.2  # ratio of neighbouring frames' scales
_ANGLE = math.radians(10.0)
_BIAS = 2**31  # cells become numbers of at least 0


@dataclass(frozen=True)
class Frame:
    """A crop's place in a photo, on the grid.

    Scaling the photo leaves it where it is.

    Attributes:
        column: Of the crop's centre, in twelfths of the crop's side from the photo's left edge.
        row: Of the crop's centre, from the upper edge.
        scale: Exponent of the crop's scale relative to the photo's longer side.
        turn: Rotation in units of 10°.
    """

    column: int
    row: int
    scale: int
    turn: int

    @classmethod
    def nearest(cls, matrix: _Matrix, photo_size: tuple[int, int], size: int) -> Frame:
        """The frame nearest to a crop.

        Args:
            matrix: float64 [2, 3], photo to crop, a similarity.
            photo_size: Height and width of the photo in pixels.
            size: Side S of the crop in pixels.
        """
        return next(cls.near(matrix, photo_size, size))

    @classmethod
    def within(
        cls, matrix: _Matrix, photo_size: tuple[int, int], size: int, share: float
    ) -> Frame | None:
        """The nearest frame if the crop is at most this share of a step from it, else None.

        Other arguments are those of `nearest`; beyond a share of ½ another frame is nearer.
        """
        return next(
            (f for far, _, f in cls._ranked(matrix, photo_size, size) if far <= share), None
        )

    @classmethod
    def near(cls, matrix: _Matrix, photo_size: tuple[int, int], size: int) -> Iterator[Frame]:
        """Frames around a crop, the nearest first; arguments as of `nearest`."""
        # Each kind is rounded by itself: a place must not be bought with another scale.
        ranked = cls._ranked(matrix, photo_size, size)
        ranked.sort(key=lambda entry: (entry[0] > 0.5, entry[1]))
        return iter([frame for *_, frame in ranked])

    @classmethod
    def _ranked(
        cls, matrix: _Matrix, photo_size: tuple[int, int], size: int
    ) -> list[tuple[float, float, Frame]]:
        """Frames around a crop: steps away in the worst kind, in all kinds, and the frame."""
        scale = math.hypot(matrix[0, 0], matrix[1, 0])
        angle = math.atan2(matrix[1, 0], matrix[0, 0])
        middle = np.full(2, (size - 1) / 2.0)
        centre = np.linalg.solve(matrix[:, :2], middle - matrix[:, 2]) + 0.5
        exponent = math.log(scale * max(photo_size) / size) / math.log(_SCALE)
        found = []
        for k, turn in product(_around(exponent), _around(angle / _ANGLE)):
            # Shifts are counted in this frame's own size.
            place = centre * _SCALE**k / max(photo_size) / _SHIFT
            for column, row in product(_around(float(place[0])), _around(float(place[1]))):
                off = (place[0] - column, place[1] - row, exponent - k, angle / _ANGLE - turn)
                found.append((max(map(abs, off)), math.hypot(*off), cls(column, row, k, turn)))
        return found

    def matrix(self, photo_size: tuple[int, int], size: int) -> _Matrix:
        """Photo to crop, float64 [2, 3]; arguments as of `nearest`."""
        relative = _SCALE**self.scale / max(photo_size)  # crops a photo pixel
        centre = np.array([self.column, self.row]) * _SHIFT / relative - 0.5
        angle, scale = self.turn * _ANGLE, relative * size
        c, s = scale * math.cos(angle), scale * math.sin(angle)
        turn = np.array([[c, -s], [s, c]])
        return np.concatenate([turn, ((size - 1) / 2.0 - turn @ centre)[:, None]], axis=1)

    @property
    def indices(self) -> tuple[int, ...]:
        """What `NoiseKey.derive` takes: the frame as numbers of at least 0."""
        return tuple(_BIAS + value for value in (self.column, self.row, self.scale, self.turn))


def _around(value: float) -> tuple[int, int]:
    low = math.floor(value)
    return low, low + 1
