"""Recovery keys: what brings protected faces back, and how it is kept.

A *recovery key* is an encoding of the faces themselves (the published method's key-E and key-I), so
it is as sensitive as the photo. It leaves memory only sealed: `RecoveryKey.seal` writes a standard
age file to a passphrase or to recipients' public keys, and `RecoveryKey.unseal` reads it back. The
*secret* (passphrase or identity) is never part of it.

A key of a group can be taken apart, so that each face has a file and a holder of its own:
`RecoveryKey.split`, `select` and `join`.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType

from diffveil.errors import KeyFileError, KeyMismatchError, OptionError
from diffveil.facekeys import FaceKey, Guarded, Picture, refuse
from diffveil.keychecks import MAX_FACES
from diffveil.keyfile import (
    MAX_FILE_BYTES,
    MAX_WORK_FACTOR,
    inspect_keyfile,
    open_sealed,
    seal_payload,
)
from diffveil.keyschema import KEY_VERSION, read_key, write_key
from diffveil.keysecrets import (
    MAX_RECIPIENTS,
    Secret,
    generate_identity,
    is_recipient,
)
from diffveil.privatefile import StrPath, read_file, write_private

__all__ = [
    "KEY_VERSION",
    "LATENTS_OF_SAMPLER",
    "MAX_PICTURES",
    "FaceKey",
    "Picture",
    "RecoveryKey",
    "generate_identity",
    "inspect_keyfile",
]

# How many latents a sampler leaves behind: O-BELM is a two-step method, so its state is two.
LATENTS_OF_SAMPLER = {"ddim": 1, "o-belm": 2, "bdia": 2}
MAX_PICTURES = 256

_MAX_STEPS = 1000
_MAX_SIDE = 1_000_000  # pixels
_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]{0,31}")
_FINGERPRINT = re.compile(r"[0-9a-f]{32,128}")
# What keys of one photo have in common.
_SHARED = ("bundle", "sampler", "steps", "photo_size", "backend", "precision")


@dataclass(frozen=True, repr=False, eq=False)
class RecoveryKey(Guarded):
    """What recovers protected faces of one photo. As a context manager it is wiped at the end.

    Attributes:
        faces: one key a face: those of the photo's faces that this key recovers.
        bundle: fingerprint of the bundle that made the key, lower-case hexadecimal.
        sampler: the sampler that inverted the faces, "o-belm", "bdia" or "ddim".
        steps: its number of steps.
        photo_size: height and width of the photo, in pixels.
        pictures: the protected pictures that the key belongs to: the variants, and what became of
            them in files.
        backend: name of the backend that made the key.
        precision: arithmetic of that backend, such as "float32".
        recipients: after `unseal`, the public keys that the file says it is sealed to. Not part of
            the key: equality ignores it, and sealing writes its own.

    Raises:
        OptionError: a field is not acceptable; the message lists all that are not.
    """

    faces: tuple[FaceKey, ...]
    bundle: str
    sampler: str
    steps: int
    photo_size: tuple[int, int]
    pictures: tuple[Picture, ...]
    backend: str
    precision: str
    recipients: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        faces: tuple[FaceKey, ...] = tuple(self.faces)
        size: tuple[int, ...] = tuple(self.photo_size)
        pictures = tuple(dict.fromkeys(self.pictures))
        problems = []
        if not 1 <= len(faces) <= MAX_FACES:
            problems.append(f"faces must number 1 to {MAX_FACES}, not {len(faces)}")
        elif len({face.layout() for face in faces}) != 1:
            problems.append("tokens and latents of all faces must have the same shapes and dtypes")
        elif len({face.number for face in faces}) != len(faces):
            problems.append("faces must have different numbers")
        elif self.sampler in LATENTS_OF_SAMPLER:
            wanted, received = LATENTS_OF_SAMPLER[self.sampler], faces[0].latents.shape[0]
            if wanted != received:
                problems.append(f"{self.sampler} leaves {wanted} latents a face, not {received}")
        if not 1 <= len(pictures) <= MAX_PICTURES:
            problems.append(f"pictures must number 1 to {MAX_PICTURES}, not {len(pictures)}")
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
        if len(self.recipients) > MAX_RECIPIENTS or not all(map(is_recipient, self.recipients)):
            problems.append(f"recipients must be at most {MAX_RECIPIENTS} age1… public keys")
        if problems:
            refuse("RecoveryKey", problems)
        object.__setattr__(self, "faces", faces)
        object.__setattr__(self, "steps", int(self.steps))
        object.__setattr__(self, "photo_size", tuple(int(side) for side in size))
        object.__setattr__(self, "pictures", pictures)

    def __repr__(self) -> str:
        return f"RecoveryKey(<redacted>, faces={len(self.faces)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RecoveryKey):
            return NotImplemented
        with _wiped(write_key(self)) as ours, _wiped(write_key(other)) as theirs:
            return hmac.compare_digest(ours, theirs)

    def __enter__(self) -> RecoveryKey:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.wipe()

    def wipe(self) -> None:
        """Overwrite the faces with zeros, here and in every key that shares them by `select`."""
        for face in self.faces:
            face.wipe()

    def require_faces(self) -> None:
        """Make sure that no face was wiped.

        Raises:
            OptionError: one was: sealing or recovering nothing would look like success.
        """
        if any(face.is_wiped for face in self.faces):
            raise OptionError("The recovery key was wiped: unseal it again.")

    def select(self, numbers: Iterable[int]) -> RecoveryKey:
        """The key of some of the faces, which share their memory with this one.

        Args:
            numbers: which faces, as in `FaceKey.number`: their places in the result's faces.

        Raises:
            OptionError: there is no such face here, or none is asked for.
        """
        mine = {face.number: face for face in self.faces}
        wanted = list(dict.fromkeys(numbers))
        unknown = [number for number in wanted if number not in mine]
        if unknown or not wanted:
            raise OptionError(
                f"The key holds the faces {', '.join(map(str, sorted(mine)))}; "
                f"asked for {', '.join(map(str, unknown)) or 'none'}."
            )
        return replace(self, faces=tuple(mine[number] for number in wanted))

    def split(self) -> tuple[RecoveryKey, ...]:
        """A key for each face, in the order of `faces`: seal each to its own holder."""
        return tuple(self.select([face.number]) for face in self.faces)

    @staticmethod
    def join(keys: Sequence[RecoveryKey]) -> RecoveryKey:
        """The key of all faces that several keys of one photo hold: the reverse of `split`.

        Raises:
            OptionError: no key is given.
            KeyMismatchError: the keys belong to different photos, or tell different things of one
                face.
        """
        if not keys:
            raise OptionError("There is no key to join.")
        first, pictures = keys[0], set(keys[0].pictures)
        faces: dict[int, FaceKey] = {}
        for place, key in enumerate(keys, start=1):
            differs = [name for name in _SHARED if getattr(key, name) != getattr(first, name)]
            if not differs and pictures.isdisjoint(key.pictures):
                differs = ["picture"]
            if differs:
                raise KeyMismatchError(
                    f"key {place} does not belong to the photo of key 1: another "
                    f"{', '.join(differs)}"
                )
            for face in key.faces:
                if faces.setdefault(face.number, face) != face:
                    raise KeyMismatchError(f"key {place} holds another face {face.number}")
        joined = dict.fromkeys(picture for key in keys for picture in key.pictures)
        ordered = tuple(faces[number] for number in sorted(faces))
        return replace(first, faces=ordered, pictures=tuple(joined), recipients=())

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
            recipients: age public keys (`age1…`); the identity of any one of them opens the key,
                and sees the list.
            allow_weak_passphrase: accept a passphrase that the rule refuses; never an empty one.

        Raises:
            OptionError: not exactly one of the two is given, or it is not acceptable.
            KeyFileError: the key is larger than a key file may be.
        """
        secret = Secret.to_seal(passphrase, recipients, allow_weak=allow_weak_passphrase)
        del passphrase, recipients  # so that no traceback of an error carries them
        return self._sealed(secret.check())

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
        secret = Secret.to_seal(passphrase, recipients, allow_weak=allow_weak_passphrase)
        del passphrase, recipients
        self.seal_with(path, secret.check(), overwrite=overwrite)

    def seal_with(self, path: StrPath, secret: Secret, *, overwrite: bool = True) -> None:
        """As `seal`, with a secret that is checked already."""
        write_private(path, self._sealed(secret), overwrite=overwrite)

    def _sealed(self, secret: Secret) -> bytes:
        self.require_faces()
        with _wiped(write_key(self, secret.recipients)) as payload:
            return seal_payload(payload, secret)

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
        secret = Secret.to_open(passphrase, identity)
        del passphrase, identity
        return cls.open_with(source, secret.check(), max_work_factor=max_work_factor)

    @classmethod
    def open_with(
        cls, source: StrPath | bytes, secret: Secret, *, max_work_factor: int = MAX_WORK_FACTOR
    ) -> RecoveryKey:
        """As `unseal`, with a secret that is checked already."""
        data = source if isinstance(source, bytes) else read_file(source, MAX_FILE_BYTES)
        with _wiped(open_sealed(data, secret, max_work_factor=max_work_factor)) as plain:
            try:
                return cls(**read_key(plain))
            except OptionError as error:
                reason = str(error)
        raise KeyFileError(f"The key file's payload is not a recovery key. {reason}")


@contextmanager
def _wiped(memory: bytearray) -> Iterator[bytearray]:
    """Key material for the length of a block, then zeros."""
    try:
        yield memory
    finally:
        memory[:] = bytes(len(memory))
