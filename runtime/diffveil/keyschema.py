"""The schema of a recovery key's payload, version 2: which tensors, which fields, which values.

`docs/keyfile-format.md` is the specification.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from diffveil.errors import KeyFileError
from diffveil.facekeys import COARSE_SIDE, FaceKey, Picture
from diffveil.keychecks import MAX_FACES
from diffveil.keypayload import TensorSpec, pack, read_metadata, unpack

if TYPE_CHECKING:
    from diffveil.keys import RecoveryKey

__all__ = ["KEY_VERSION", "read_key", "write_key"]

KEY_VERSION = 2

_FORMAT = "diffveil-recovery-key"
_NUMBER = re.compile(r"[1-9][0-9]{0,6}")
_TEXTS = ("backend", "bundle", "format", "precision", "recipients", "sampler")
_NUMBERS = ("photo_height", "photo_width", "steps", "version")
_FIELDS = frozenset((*_TEXTS, *_NUMBERS))

# One row a face in each of these, so that a few tensors hold any number of faces …
_FACE_TENSORS = {
    "boxes": TensorSpec(("F64",), (2,)),
    "landmarks": TensorSpec(("F64",), (3,)),
    "latents": TensorSpec(("F16", "F32"), (5,)),
    "matrices": TensorSpec(("F64",), (3,)),
    "numbers": TensorSpec(("U16",), (1,)),
    "tokens": TensorSpec(("F16", "F32"), (3, 4)),
}
# … and one row a picture in these.
_PICTURE_TENSORS = {
    "picture_colours": TensorSpec(("U8",), (4,)),
    "picture_digests": TensorSpec(("U8",), (2,)),
}


def write_key(key: RecoveryKey, recipients: Sequence[str] = ()) -> bytearray:
    """The payload of a key, in memory that the caller can wipe.

    Args:
        key: the key.
        recipients: public keys that the file will be sealed to.
    """
    height, width = key.photo_size
    cells = (len(key.pictures), COARSE_SIDE, COARSE_SIDE, 3)
    tensors: dict[str, npt.NDArray[Any]] = {
        "boxes": np.array([face.box for face in key.faces], dtype=np.float64),
        "landmarks": np.stack([face.landmarks for face in key.faces]),
        "latents": np.stack([face.latents for face in key.faces]),
        "matrices": np.stack([face.matrix for face in key.faces]),
        "numbers": np.array([face.number for face in key.faces], dtype=np.uint16),
        "picture_colours": _bytes_of([p.coarse for p in key.pictures]).reshape(cells),
        "picture_digests": _bytes_of([p.digest for p in key.pictures]),
        "tokens": np.stack([face.tokens for face in key.faces]),
    }
    metadata = {
        "backend": key.backend,
        "bundle": key.bundle,
        "format": _FORMAT,
        "photo_height": str(height),
        "photo_width": str(width),
        "precision": key.precision,
        "recipients": " ".join(recipients),
        "sampler": key.sampler,
        "steps": str(key.steps),
        "version": str(KEY_VERSION),
    }
    try:
        return pack(tensors, metadata)
    finally:
        for name in ("latents", "tokens", "landmarks"):
            tensors[name].fill(0)


def read_key(plain: bytes | bytearray) -> dict[str, Any]:
    """Read a payload and trust nothing: that it decrypts says who may read it, not who wrote it.

    Returns:
        The fields of a `RecoveryKey`, by name.

    Raises:
        KeyFileError: it is not a recovery key, or of another version.
        OptionError: a face is not acceptable.
    """
    described = read_metadata(plain)
    if described.get("format") != _FORMAT:
        raise KeyFileError("The age file opens, but what it holds is not a recovery key.")
    version = described.get("version", "")
    if _NUMBER.fullmatch(version) and int(version) != KEY_VERSION:
        way_out = "Use a newer diffveil." if int(version) > KEY_VERSION else "Use diffveil 0.1."
        raise KeyFileError(
            f"The key file's payload has version {version}; this diffveil reads {KEY_VERSION}. "
            f"{way_out}"
        )
    tensors, fields = unpack(plain, {**_FACE_TENSORS, **_PICTURE_TENSORS}, _FIELDS)
    if not all(_NUMBER.fullmatch(fields[name]) for name in _NUMBERS):
        raise KeyFileError("The key file's payload is not a recovery key: a number is malformed.")
    _check_rows(tensors)
    columns = ("tokens", "latents", "matrices", "boxes", "landmarks")
    rows = zip(*(tensors[name] for name in columns), tensors["numbers"].tolist(), strict=True)
    pictures = zip(tensors["picture_digests"], tensors["picture_colours"], strict=True)
    try:
        return {
            "faces": tuple(FaceKey(*row) for row in rows),
            "bundle": fields["bundle"],
            "sampler": fields["sampler"],
            "steps": int(fields["steps"]),
            "photo_size": (int(fields["photo_height"]), int(fields["photo_width"])),
            "pictures": tuple(Picture(d.tobytes(), c.tobytes()) for d, c in pictures),
            "backend": fields["backend"],
            "precision": fields["precision"],
            "recipients": tuple(fields["recipients"].split(" ")) if fields["recipients"] else (),
        }
    finally:
        for name in ("latents", "tokens", "landmarks"):
            tensors[name].fill(0)


def _check_rows(tensors: dict[str, npt.NDArray[Any]]) -> None:
    if (
        len({len(tensors[name]) for name in _FACE_TENSORS}) != 1
        or len(tensors["boxes"]) > MAX_FACES
    ):
        raise KeyFileError(
            "The key file's payload is not a recovery key: its tensors must agree on the number of "
            f"faces, at most {MAX_FACES}."
        )
    digests, colours = tensors["picture_digests"], tensors["picture_colours"]
    if colours.shape != (len(digests), COARSE_SIDE, COARSE_SIDE, 3):
        raise KeyFileError(
            "The key file's payload is not a recovery key: its tensors must agree on the number of "
            f"pictures, and picture_colours be [pictures, {COARSE_SIDE}, {COARSE_SIDE}, 3]."
        )


def _bytes_of(rows: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), -1)
