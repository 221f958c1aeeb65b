"""Recovery keys: what brings a protected face back, and how it is kept.

A *recovery key* is an encoding of the face itself (the published method's key-E and key-I), so it
is as sensitive as the photo. It leaves memory only sealed: `RecoveryKey.seal` writes a standard age
file to a passphrase or to recipients' public keys, and `RecoveryKey.unseal` reads it back. The
*secret* (passphrase or identity) is never part of it.

Keys do not print, pickle or hash, and they compare in constant time.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from diffveil.errors import KeyFileError, OptionError
from diffveil.keychecks import check_array, check_codes, check_geometry, to_codes, to_float64
from diffveil.keyfile import (
    MAX_FILE_BYTES,
    MAX_WORK_FACTOR,
    inspect_keyfile,
    open_sealed,
    seal_payload,
)
from diffveil.keypayload import TensorSpec, pack, read_metadata, unpack
from diffveil.keysecrets import generate_identity
from diffveil.privatefile import StrPath, read_file, write_private

__all__ = [
    "KEY_VERSION",
    "LATENTS_OF_SAMPLER",
    "FaceKey",
    "RecoveryKey",
    "generate_identity",
    "inspect_keyfile",
]

KEY_VERSION = 1
# How many latents a sampler leaves behind: O-BELM is a two-step method, so its state is two.
LATENTS_OF_SAMPLER = {"ddim": 1, "o-belm": 2, "bdia": 2}

_FORMAT = "diffveil-recovery-key"
_STAGES = 10
_MAX_FACES = 1024
_MAX_STEPS = 1000
_MAX_SIDE = 1_000_000  # pixels
_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]{0,31}")
_FINGERPRINT = re.compile(r"[0-9a-f]{32,128}")
_NUMBER = re.compile(r"[1-9][0-9]{0,6}")

# One row a face in each, so that five tensors hold any number of faces.
_TENSORS = {
    "boxes": TensorSpec(("F64",), 2),
    "landmarks": TensorSpec(("F64",), 3),
    "latents": TensorSpec(("F16", "F32"), 5),
    "matrices": TensorSpec(("F64",), 3),
    "tokens": TensorSpec(("F16", "F32"), 3),
}
_TEXTS = ("backend", "bundle", "format", "precision", "sampler")
_NUMBERS = ("photo_height", "photo_width", "steps", "version")

_Self = TypeVar("_Self", bound="_Guarded")


class _Guarded:
    """What every object that holds key material does and refuses to do."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        # TypeError is what Python's pickle protocol expects of an object that takes no part in it.
        raise TypeError(f"a {type(self).__name__} is never pickled: seal it instead")

    def __copy__(self: _Self) -> _Self:
        return self  # immutable; one copy of a secret is enough

    def __deepcopy__(self: _Self, memo: object) -> _Self:
        return self


@dataclass(frozen=True, repr=False, eq=False)
class FaceKey(_Guarded):
    """What recovers one face. Arrays are copied on construction and read-only from then on.

    Attributes:
        tokens: key-E, [10, D] float16 or float32, one row a stage.
        latents: key-I, [K, C, s, s] float32 or float16, the noisiest first; K is 1 for DDIM, 2 for
            O-BELM.
        matrix: [2, 3] float64, takes photo pixels (x, y, 1) to crop pixels (x, y).
        box: x0, y0, x1, y1 in photo pixels.
        landmarks: [5, 2] float64, (x, y) in photo pixels: eyes, nose, corners of the mouth; the
            image's left one first.

    Raises:
        OptionError: a shape, dtype or value is not acceptable; the message lists all of them.
    """

    tokens: npt.NDArray[np.floating]
    latents: npt.NDArray[np.floating]
    matrix: npt.NDArray[np.float64]
    box: tuple[float, float, float, float]
    landmarks: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        tokens, latents = to_codes(self.tokens), to_codes(self.latents)
        matrix, box, landmarks = map(to_float64, (self.matrix, self.box, self.landmarks))
        problems = [
            *check_array("tokens", tokens, (_STAGES, None)),
            *check_array("latents", latents, (None, None, None, None)),
            *check_array("matrix", matrix, (2, 3)),
            *check_array("box", box, (4,)),
            *check_array("landmarks", landmarks, (5, 2)),
        ]
        if problems:
            _refuse("FaceKey", problems)
        assert tokens is not None
        assert latents is not None
        assert matrix is not None
        assert box is not None
        assert landmarks is not None
        problems = check_codes(tokens.shape, latents.shape)
        problems += check_geometry(matrix, box, landmarks)
        if problems:
            _refuse("FaceKey", problems)
        for array in (tokens, latents, matrix, landmarks):
            array.setflags(write=False)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "latents", latents)
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "box", tuple(box.tolist()))
        object.__setattr__(self, "landmarks", landmarks)

    def __repr__(self) -> str:
        return "FaceKey(<redacted>)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FaceKey):
            return NotImplemented
        return self._layout() == other._layout() and hmac.compare_digest(
            b"".join(self._parts()), b"".join(other._parts())
        )

    def _layout(self) -> tuple[object, ...]:
        """What all faces of one key have in common."""
        return self.tokens.shape, self.tokens.dtype, self.latents.shape, self.latents.dtype

    def _parts(self) -> Iterator[bytes]:
        for array in (self.tokens, self.latents, self.matrix, np.array(self.box), self.landmarks):
            yield array.tobytes()


@dataclass(frozen=True, repr=False, eq=False)
class RecoveryKey(_Guarded):
    """What recovers all protected faces of one photo.

    Attributes:
        faces: one key a face, in the order of the result's faces.
        bundle: fingerprint of the bundle that made the key, lower-case hexadecimal.
        sampler: the sampler that inverted the faces, "o-belm", "bdia" or "ddim".
        steps: its number of steps.
        photo_size: height and width of the photo, in pixels.
        backend: name of the backend that made the key.
        precision: arithmetic of that backend, such as "float32".
        version: of the payload's schema.

    Raises:
        OptionError: a field is not acceptable; the message lists all that are not.
    """

    faces: tuple[FaceKey, ...]
    bundle: str
    sampler: str
    steps: int
    photo_size: tuple[int, int]
    backend: str
    precision: str
    version: int = KEY_VERSION

    def __post_init__(self) -> None:
        faces: tuple[FaceKey, ...] = tuple(self.faces)
        size: tuple[int, ...] = tuple(self.photo_size)
        problems = []
        if not 1 <= len(faces) <= _MAX_FACES:
            problems.append(f"faces must number 1 to {_MAX_FACES}, not {len(faces)}")
        elif len({face._layout() for face in faces}) != 1:
            problems.append("tokens and latents of all faces must have the same shapes and dtypes")
        elif self.sampler in LATENTS_OF_SAMPLER:
            wanted, received = LATENTS_OF_SAMPLER[self.sampler], faces[0].latents.shape[0]
            if wanted != received:
                problems.append(f"{self.sampler} leaves {wanted} latents a face, not {received}")
        if not _FINGERPRINT.fullmatch(self.bundle):
            problems.append("bundle must be a fingerprint of 32 to 128 hexadecimal digits")
        if self.sampler not in LATENTS_OF_SAMPLER:
            problems.append(f"sampler must be one of {', '.join(sorted(LATENTS_OF_SAMPLER))}")
        if not 1 <= self.steps <= _MAX_STEPS:
            problems.append(f"steps must be 1 to {_MAX_STEPS}")
        if len(size) != 2 or not all(1 <= side <= _MAX_SIDE for side in size):
            problems.append(f"photo_size must be height and width, each 1 to {_MAX_SIDE} pixels")
        for name, value in (("backend", self.backend), ("precision", self.precision)):
            if not _NAME.fullmatch(value):
                problems.append(f"{name} must be 1 to 32 of a-z, 0-9, '.', '_', '+', '-'")
        if self.version != KEY_VERSION:
            problems.append(f"version must be {KEY_VERSION}")
        if problems:
            _refuse("RecoveryKey", problems)
        object.__setattr__(self, "faces", faces)
        object.__setattr__(self, "steps", int(self.steps))
        object.__setattr__(self, "photo_size", tuple(int(side) for side in size))

    def __repr__(self) -> str:
        return f"RecoveryKey(<redacted>, faces={len(self.faces)}, version={self.version})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RecoveryKey):
            return NotImplemented
        return hmac.compare_digest(_encode(self), _encode(other))

    def seal_bytes(
        self,
        *,
        passphrase: str | None = None,
        recipients: Sequence[str] = (),
        allow_weak_passphrase: bool = False,
    ) -> bytes:
        """Return the key sealed, as the bytes of an age file.

        Args:
            passphrase: text of 8 characters or more; stretching it takes one to two seconds.
            recipients: age public keys (`age1…`); the identity of any one of them opens the key.
            allow_weak_passphrase: accept a passphrase that the rule refuses; never an empty one.

        Raises:
            OptionError: not exactly one of the two is given, or it is not acceptable.
            KeyFileError: the key is larger than a key file may be.
        """
        return seal_payload(
            _encode(self),
            passphrase=passphrase,
            recipients=recipients,
            allow_weak_passphrase=allow_weak_passphrase,
        )

    def seal(
        self,
        path: StrPath,
        *,
        passphrase: str | None = None,
        recipients: Sequence[str] = (),
        allow_weak_passphrase: bool = False,
        overwrite: bool = True,
    ) -> None:
        """Write the sealed key to a file that only its owner may read (0600).

        The file is complete or not there: an interrupted write leaves what was there before.

        Args:
            path: file to write; its folder must exist.
            passphrase: as for `seal_bytes`.
            recipients: as for `seal_bytes`.
            allow_weak_passphrase: as for `seal_bytes`.
            overwrite: replace a file that is already there.

        Raises:
            OptionError: as `seal_bytes`; or the file exists and `overwrite` is false.
            KeyFileError: as `seal_bytes`; or the file cannot be written.
        """
        sealed = self.seal_bytes(
            passphrase=passphrase,
            recipients=recipients,
            allow_weak_passphrase=allow_weak_passphrase,
        )
        write_private(path, sealed, overwrite=overwrite)

    @classmethod
    def unseal(
        cls,
        source: StrPath | bytes,
        *,
        passphrase: str | None = None,
        identity: StrPath | None = None,
        max_work_factor: int = MAX_WORK_FACTOR,
    ) -> RecoveryKey:
        """Open a key file.

        Args:
            source: path of the key file, or its bytes.
            passphrase: the text that it was sealed with.
            identity: `AGE-SECRET-KEY-1…` text, or the path of an age identity file.
            max_work_factor: largest accepted log2 of scrypt's cost; it takes 2^(factor + 10) bytes.

        Raises:
            OptionError: not exactly one secret is given, or the identity is malformed.
            WrongSecretError: the secret does not open the file.
            KeyFileError: the file is missing, damaged, too large or not a key file.
        """
        data = source if isinstance(source, bytes) else read_file(source, MAX_FILE_BYTES)
        return _decode(
            open_sealed(
                data, passphrase=passphrase, identity=identity, max_work_factor=max_work_factor
            )
        )


def _refuse(what: str, problems: Sequence[str]) -> NoReturn:
    raise OptionError(f"{what}: {'; '.join(problems)}.")


def _encode(key: RecoveryKey) -> bytes:
    height, width = key.photo_size
    tensors: dict[str, npt.NDArray[Any]] = {
        "boxes": np.array([face.box for face in key.faces], dtype=np.float64),
        "landmarks": np.stack([face.landmarks for face in key.faces]),
        "latents": np.stack([face.latents for face in key.faces]),
        "matrices": np.stack([face.matrix for face in key.faces]),
        "tokens": np.stack([face.tokens for face in key.faces]),
    }
    metadata = {
        "backend": key.backend,
        "bundle": key.bundle,
        "format": _FORMAT,
        "photo_height": str(height),
        "photo_width": str(width),
        "precision": key.precision,
        "sampler": key.sampler,
        "steps": str(key.steps),
        "version": str(key.version),
    }
    return pack(tensors, metadata)


def _decode(plain: bytes) -> RecoveryKey:
    """Read a payload and trust nothing: that it decrypts says who may read it, not who wrote it."""
    described = read_metadata(plain)
    if described.get("format") != _FORMAT:
        raise KeyFileError("The age file opens, but what it holds is not a recovery key.")
    version = described.get("version", "")
    if _NUMBER.fullmatch(version) and int(version) != KEY_VERSION:
        raise KeyFileError(
            f"The key file's payload has version {version}; this diffveil reads {KEY_VERSION}. "
            "Use a newer diffveil."
        )
    tensors, fields = unpack(plain, _TENSORS, frozenset((*_TEXTS, *_NUMBERS)))
    if not all(_NUMBER.fullmatch(fields[name]) for name in _NUMBERS):
        raise KeyFileError("The key file's payload is not a recovery key: a number is malformed.")
    if len({len(tensor) for tensor in tensors.values()}) != 1 or len(tensors["boxes"]) > _MAX_FACES:
        raise KeyFileError(
            "The key file's payload is not a recovery key: its tensors must agree on the number of "
            f"faces, at most {_MAX_FACES}."
        )
    columns = (tensors[name] for name in ("tokens", "latents", "matrices", "boxes", "landmarks"))
    try:
        return RecoveryKey(
            faces=tuple(FaceKey(*row) for row in zip(*columns, strict=True)),
            bundle=fields["bundle"],
            sampler=fields["sampler"],
            steps=int(fields["steps"]),
            photo_size=(int(fields["photo_height"]), int(fields["photo_width"])),
            backend=fields["backend"],
            precision=fields["precision"],
            version=int(fields["version"]),
        )
    except OptionError as error:
        raise KeyFileError(f"The key file's payload is not a recovery key. {error}") from error
