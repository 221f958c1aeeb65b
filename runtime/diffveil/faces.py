"""What a detector finds, and what a detector is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffveil.errors import OptionError

__all__ = ["LANDMARK_NAMES", "Face", "FaceDetector"]

LANDMARK_NAMES = ("left eye", "right eye", "nose", "left mouth corner", "right mouth corner")
"""The order of the five landmarks. Left is the picture's left, not the person's."""


@dataclass(frozen=True, eq=False)
class Face:
    """One face in one photo.

    Coordinates are pixels of the upright photo; the centre of the first pixel is (0, 0). Boxes and
    landmarks may lie outside the photo where a face is cut off by its border.

    Attributes:
        box: (x0, y0, x1, y1), x0 < x1 and y0 < y1.
        landmarks: float64 [5, 2], (x, y) in the order of `LANDMARK_NAMES`, read-only. Any array or
            nested sequence of that shape is accepted.
        score: The detector's confidence, 0 … 1; 1 for a face that the app itself names.

    Raises:
        OptionError: Listing all that is wrong with the values.
    """

    box: tuple[float, float, float, float]
    landmarks: NDArray[np.float64]
    score: float = 1.0

    def __post_init__(self) -> None:
        """Bring the fields to their types; report every problem at once."""
        problems = []
        try:
            box = tuple(float(value) for value in self.box)
        except (TypeError, ValueError):
            box = ()
        if len(box) != 4 or not all(map(math.isfinite, box)):
            problems.append("box: expected four finite numbers (x0, y0, x1, y1)")
        elif box[0] >= box[2] or box[1] >= box[3]:
            problems.append(f"box: {box} is empty, expected x0 < x1 and y0 < y1")
        landmarks = _landmarks(self.landmarks)
        if landmarks is None:
            problems.append("landmarks: expected five finite points (x, y)")
        try:
            score = float(self.score)
        except (TypeError, ValueError):
            score = math.nan
        if not 0.0 <= score <= 1.0:
            problems.append(f"score: received {self.score!r}, expected 0 … 1")
        if problems:
            raise OptionError("face: " + "; ".join(problems))
        object.__setattr__(self, "box", box)
        object.__setattr__(self, "landmarks", landmarks)
        object.__setattr__(self, "score", score)

    @property
    def width(self) -> float:
        """Width of the box in pixels."""
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        """Height of the box in pixels."""
        return self.box[3] - self.box[1]

    def __eq__(self, other: object) -> bool:
        """Equal in every number."""
        if not isinstance(other, Face):
            return NotImplemented
        return (
            self.box == other.box
            and self.score == other.score
            and bool(np.array_equal(self.landmarks, other.landmarks))
        )

    def __hash__(self) -> int:
        """Consistent with `__eq__`."""
        return hash((self.box, self.score, self.landmarks.tobytes()))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers: `box`, `landmarks` in hundredths of a pixel, `score`."""
        return {
            "box": [round(value, 2) for value in self.box],
            "landmarks": [[round(x, 2), round(y, 2)] for x, y in self.landmarks.tolist()],
            "score": round(self.score, 4),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Face:
        """The face that `to_json` wrote.

        Raises:
            OptionError: A field is missing, unknown or malformed.
        """
        if set(value) - {"score"} != {"box", "landmarks"}:
            raise OptionError("face: expected an object with box, landmarks and score")
        return cls(value["box"], value["landmarks"], value.get("score", 1.0))


@runtime_checkable
class FaceDetector(Protocol):
    """Finds faces. Any object with this method will do, for instance around an app's own model."""

    def detect(self, pixels: NDArray[np.uint8], /) -> Sequence[Face]:
        """Find all faces, the most certain first.

        Args:
            pixels: uint8 [H, W, 3], RGB, upright.
        """
        ...


def _landmarks(value: ArrayLike) -> NDArray[np.float64] | None:
    """A private read-only float64 [5, 2], or None if that is not what this is."""
    try:
        landmarks = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if landmarks.shape != (5, 2) or not np.isfinite(landmarks).all():
        return None
    landmarks.flags.writeable = False
    return landmarks
