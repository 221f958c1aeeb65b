"""What recovers one face, and what says which picture it belongs to.

These objects do not print, pickle or hash, and compare in constant time.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from diffveil.errors import OptionError
from diffveil.keychecks import (
    MAX_FACES,
    check_array,
    check_codes,
    check_geometry,
    to_codes,
    to_float64,
)

__all__ = ["COARSE_SIDE", "FaceKey", "Guarded", "Picture", "refuse"]

COARSE_SIDE = 8
"""Side of the coarse colours of a picture, in cells."""

_STAGES = 10
_DIGEST_BYTES = 32

_Self = TypeVar("_Self", bound="Guarded")


class Guarded:
    """What every object that holds key material or a secret does and refuses to do."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        # TypeError is what Python's pickle protocol expects of an object that takes no part in it.
        raise TypeError(f"a {type(self).__name__} is never pickled: seal keys instead")

    def __copy__(self: _Self) -> _Self:
        return self  # immutable; one copy of a secret is enough

    def __deepcopy__(self: _Self, memo: object) -> _Self:
        return self


@dataclass(frozen=True, repr=False)
class Picture:
    """How a protected picture is known again.

    Attributes:
        digest: SHA-256 of its size and pixels, 32 bytes (`diffveil.photos.photo_digest`).
        coarse: its mean colours in 8×8 cells, row by row, RGB, 192 bytes.

    Raises:
        OptionError: a length is not that.
    """

    digest: bytes
    coarse: bytes

    def __post_init__(self) -> None:
        cells = COARSE_SIDE * COARSE_SIDE * 3
        if len(self.digest) != _DIGEST_BYTES or len(self.coarse) != cells:
            refuse("Picture", [f"digest must be {_DIGEST_BYTES} bytes and coarse {cells}"])

    def __repr__(self) -> str:
        return "Picture(<redacted>)"


@dataclass(frozen=True, repr=False, eq=False)
class FaceKey(Guarded):
    """What recovers one face. Arrays are copied on construction and read-only from then on.

    Attributes:
        tokens: key-E, [10, D] float16 or float32, one row a stage. Or, where no tokens exist (keys
            of the research release), the conditionings that they expand to, [10, T, W].
        latents: key-I, [K, C, s, s] float32 or float16, the noisiest first; K is 1 for DDIM, 2 for
            O-BELM and BDIA.
        matrix: [2, 3] float64, takes photo pixels (x, y, 1) to crop pixels (x, y).
        box: x0, y0, x1, y1 in photo pixels.
        landmarks: [5, 2] float64, (x, y) in photo pixels: eyes, nose, corners of the mouth; the
            image's left one first.
        number: which of the photo's faces it is, from 0, in the order of the result's faces.

    Raises:
        OptionError: a shape, dtype or value is not acceptable; the message lists all of them.
    """

    tokens: npt.NDArray[np.floating]
    latents: npt.NDArray[np.floating]
    matrix: npt.NDArray[np.float64]
    box: tuple[float, float, float, float]
    landmarks: npt.NDArray[np.float64]
    number: int = 0

    def __post_init__(self) -> None:
        tokens, latents = to_codes(self.tokens), to_codes(self.latents)
        matrix, box, landmarks = map(to_float64, (self.matrix, self.box, self.landmarks))
        expanded = tokens is not None and tokens.ndim == 3
        problems = [
            *check_array("tokens", tokens, (_STAGES, None, None) if expanded else (_STAGES, None)),
            *check_array("latents", latents, (None, None, None, None)),
            *check_array("matrix", matrix, (2, 3)),
            *check_array("box", box, (4,)),
            *check_array("landmarks", landmarks, (5, 2)),
        ]
        if not 0 <= self.number < MAX_FACES:
            problems.append(f"number must be 0 to {MAX_FACES - 1}")
        if problems:
            refuse("FaceKey", problems)
        assert tokens is not None
        assert latents is not None
        assert matrix is not None
        assert box is not None
        assert landmarks is not None
        problems = check_codes(tokens.shape, latents.shape)
        problems += check_geometry(matrix, box, landmarks)
        if problems:
            refuse("FaceKey", problems)
        for array in (tokens, latents, matrix, landmarks):
            array.setflags(write=False)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "latents", latents)
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "box", tuple(box.tolist()))
        object.__setattr__(self, "landmarks", landmarks)
        object.__setattr__(self, "number", int(self.number))

    def __repr__(self) -> str:
        return "FaceKey(<redacted>)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FaceKey):
            return NotImplemented
        return (
            self.layout() == other.layout()
            and self.number == other.number
            and hmac.compare_digest(b"".join(self._parts()), b"".join(other._parts()))
        )

    def layout(self) -> tuple[object, ...]:
        """What all faces of one key have in common."""
        return self.tokens.shape, self.tokens.dtype, self.latents.shape, self.latents.dtype

    @property
    def is_wiped(self) -> bool:
        """Whether `wipe` was called: noise is never zero throughout."""
        return not self.latents.any()

    def wipe(self) -> None:
        """Overwrite the arrays with zeros; the face cannot be recovered from this object again."""
        for array in (self.tokens, self.latents, self.landmarks):
            array.setflags(write=True)
            array.fill(0)
            array.setflags(write=False)

    def _parts(self) -> Iterator[bytes]:
        for array in (self.tokens, self.latents, self.matrix, np.array(self.box), self.landmarks):
            yield array.tobytes()


def refuse(what: str, problems: Sequence[str]) -> NoReturn:
    """Raise the error of an object that cannot be made.

    Raises:
        OptionError: always.
    """
    raise OptionError(f"{what}: {'; '.join(problems)}.")
