"""Secrets as people hand them in: passphrases, age recipients and age identities.

Everything is checked before age sees it, and nothing is ever quoted in an error: to paste an
identity where a recipient or a path belongs is an easy mistake, and error texts end up in logs. For
the same reason no error is raised here while one is handled that carries the text itself
(`UnicodeEncodeError` does), nor by a function whose local variables hold it: reporters of errors
record local variables too. `Secret` is how the rest of the library holds one.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from diffveil.agestreams import Sink, Source
from diffveil.errors import BackendUnavailableError, KeyFileError, OptionError
from diffveil.facekeys import Guarded
from diffveil.privatefile import StrPath, read_file

__all__ = [
    "MAX_IDENTITIES",
    "MAX_RECIPIENTS",
    "MIN_PASSPHRASE_CHARACTERS",
    "Secret",
    "check_passphrase",
    "generate_identity",
    "is_recipient",
    "load_pyrage",
]

MAX_RECIPIENTS = 128
MAX_IDENTITIES = 32
MIN_PASSPHRASE_CHARACTERS = 8
_MIN_DISTINCT_CHARACTERS = 4
_MAX_PASSPHRASE_BYTES = 1024
_MAX_IDENTITY_BYTES = 64 << 10
_WEAK_HINT = " (or allow it: allow_weak_passphrase=True, --allow-weak-passphrase)."

_IDENTITY = re.compile(r"AGE-SECRET-KEY-1[0-9A-Z]{58}")
_RECIPIENT = re.compile(r"age1[0-9a-z]{58}")


def load_pyrage() -> Any:
    """Import `pyrage` late: `import diffveil` should not pay for cryptography.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        return importlib.import_module("pyrage")  # by name: it ships no types
    except ImportError as error:
        raise BackendUnavailableError(
            "Key files need the package pyrage: pip install pyrage"
        ) from error


def generate_identity() -> tuple[str, str]:
    """Make a new age X25519 key pair.

    Returns:
        The recipient (`age1…`: public, seals) and the identity (`AGE-SECRET-KEY-1…`: secret).

    Raises:
        BackendUnavailableError: `pyrage` is not installed.
    """
    identity = load_pyrage().x25519.Identity.generate()
    return str(identity.to_public()), str(identity)


class Secret(Guarded):
    """What seals or opens a key file. It shows nothing, also where it is a local variable.

    `to_seal` and `to_open` make one and never fail, so that a caller can forget the original before
    `check` says what is wrong with it:

        secret = Secret.to_open(passphrase, identity)
        del passphrase, identity
        secret.check()
    """

    def __init__(
        self,
        passphrase: str | None,
        problem: str | None,
        *,
        recipients: tuple[str, ...] = (),
        identity: StrPath | None = None,
    ) -> None:
        self._passphrase = passphrase
        self._problem = problem
        self._identity = identity
        self._identities: list[Any] = []
        self.recipients = recipients

    def __repr__(self) -> str:
        return "Secret(<redacted>)"

    @classmethod
    def to_seal(
        cls, passphrase: str | None, recipients: Sequence[str], *, allow_weak: bool = False
    ) -> Secret:
        """A passphrase or recipients, of which the same one given twice counts once."""
        problem: str | None = None
        if isinstance(recipients, str) or not all(isinstance(one, str) for one in recipients):
            problem = "recipients must be a sequence of age1… public keys, not one string."
            recipients = ()
        elif passphrase is not None and recipients:
            problem = "Seal to a passphrase or to recipients, not to both."
        elif passphrase is not None:
            problem = _passphrase_problem(passphrase, allow_weak)
        elif not recipients:
            problem = "Nothing to seal to: give a passphrase or at least one recipient."
        unique = tuple(dict.fromkeys(recipient.strip() for recipient in recipients))
        return cls(passphrase, problem, recipients=unique)

    @classmethod
    def to_open(cls, passphrase: str | None, identity: StrPath | None) -> Secret:
        """A passphrase or an identity, which is read when it is needed."""
        problem: str | None = None
        if passphrase is not None and identity is not None:
            problem = "Give a passphrase or an identity to open a key file, not both."
        elif passphrase is not None:
            problem = _passphrase_problem(passphrase, allow_weak=True)
        elif identity is None:
            problem = "Give a passphrase or an identity to open a key file."
        return cls(passphrase, problem, identity=identity)

    def check(self) -> Secret:
        """Return this if it is exactly one secret, and acceptable.

        Raises:
            OptionError: it is not.
            BackendUnavailableError: `pyrage` is not installed.
        """
        problem = self._problem or _recipients_problem(self.recipients)
        if problem:
            raise OptionError(problem)
        return self

    @property
    def is_passphrase(self) -> bool:
        """Whether it is one, rather than recipients or an identity."""
        return self._passphrase is not None

    def read_identities(self) -> None:
        """Get an identity ready to decrypt.

        Raises:
            OptionError: it is none.
            BackendUnavailableError: `pyrage` is not installed.
        """
        assert self._identity is not None
        self._identities = _parse_identities(self._identity)

    def encrypt(self, payload: bytearray) -> bytes:
        """The payload as an age file.

        Raises:
            BackendUnavailableError: `pyrage` is not installed.
        """
        pyrage = load_pyrage()
        if self._passphrase is not None:  # this call of pyrage takes nothing that could be wiped
            return bytes(pyrage.passphrase.encrypt(bytes(payload), self._passphrase))
        parse = pyrage.x25519.Recipient.from_str
        sink = io.BytesIO()
        with memoryview(payload) as view:
            pyrage.encrypt_io(Source(view), sink, [parse(text) for text in self.recipients])
        return sink.getvalue()

    def decrypt(self, data: bytes, payload_bytes: int) -> bytearray:
        """The plaintext of an age file, in memory that the caller can wipe.

        An identity must have been read before.

        Args:
            data: the file.
            payload_bytes: size of its encrypted payload, at least that of the plaintext.

        Raises:
            pyrage.DecryptError: it does not open, or its header is damaged.
            OSError: it is damaged behind the header.
            BackendUnavailableError: `pyrage` is not installed.
        """
        pyrage = load_pyrage()
        if self._passphrase is not None:
            return bytearray(pyrage.passphrase.decrypt(data, self._passphrase))
        sink = Sink(payload_bytes)
        try:
            pyrage.decrypt_io(io.BytesIO(data), sink, self._identities)
        except BaseException:
            sink.wipe()
            raise
        return sink.plain()


def is_recipient(text: str) -> bool:
    """Whether this has the form of an age X25519 public key; its checksum is not looked at."""
    return _RECIPIENT.fullmatch(text) is not None


def check_passphrase(passphrase: str) -> None:
    """Accept a passphrase that is hard enough to guess; there is no way round it here.

    Raises:
        OptionError: It is none, or a weak one; the message does not quote it.
    """
    problem = _passphrase_problem(passphrase, allow_weak=False)
    if problem:
        raise OptionError(problem.removesuffix(_WEAK_HINT))


def _passphrase_problem(passphrase: str, allow_weak: bool) -> str | None:
    """Why this is no passphrase or, unless allowed, a weak one: a floor, not a measure."""
    if not isinstance(passphrase, str):
        return "The passphrase must be text."
    if not passphrase.strip():
        return "The passphrase is empty."
    try:
        size = len(passphrase.encode("utf-8"))
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= _MAX_PASSPHRASE_BYTES or "\0" in passphrase:
        return f"The passphrase must be at most {_MAX_PASSPHRASE_BYTES} bytes of UTF-8 without NUL."
    if allow_weak:
        return None
    if len(passphrase) < MIN_PASSPHRASE_CHARACTERS:
        short = f"fewer than {MIN_PASSPHRASE_CHARACTERS} characters"
    elif len(set(passphrase)) < _MIN_DISTINCT_CHARACTERS:
        short = f"fewer than {_MIN_DISTINCT_CHARACTERS} different characters"
    else:
        return None
    return (
        f"The passphrase has {short}. Whoever gets the file can guess at it without limit: use "
        "several random words" + _WEAK_HINT
    )


def _recipients_problem(recipients: Sequence[str]) -> str | None:
    if not recipients:
        return None
    pyrage = load_pyrage()
    if len(recipients) > MAX_RECIPIENTS:
        return f"{len(recipients)} recipients are given; at most {MAX_RECIPIENTS} can be."
    for number, text in enumerate(recipients, start=1):
        sound = False
        if is_recipient(text):
            with suppress(pyrage.RecipientError):
                pyrage.x25519.Recipient.from_str(text)
                sound = True
        if not sound:
            return f"Recipient {number} is not an age X25519 public key (age1…)."
    return None


def _parse_identities(identity: StrPath) -> list[Any]:
    """Parse identities into pyrage identities.

    Args:
        identity: `AGE-SECRET-KEY-1…` lines (`#` comments), or the path of a file of them.

    Raises:
        OptionError: it is neither, or a line is not an identity.
    """
    identities, problem = [], None
    text = _identity_text(identity)
    del identity
    if text is None:
        raise OptionError(
            "The identity is neither AGE-SECRET-KEY-1… text nor a readable text file of at most "
            f"{_MAX_IDENTITY_BYTES} bytes that holds it."
        )
    for number, line in enumerate(text.splitlines(), start=1):
        parsed = _parse_identity(line.strip())
        if parsed is not None:
            identities.append(parsed)
        elif line.strip() and not line.strip().startswith("#"):
            problem = f"Line {number} of the identity is not an AGE-SECRET-KEY-1… key."
            break
    text = line = ""
    if not problem and not 1 <= len(identities) <= MAX_IDENTITIES:
        problem = f"The identity holds {len(identities)} keys; it must hold 1 to {MAX_IDENTITIES}."
    if problem:
        raise OptionError(problem)
    return identities


def _parse_identity(line: str) -> Any | None:
    pyrage = load_pyrage()
    if _IDENTITY.fullmatch(line):
        with suppress(pyrage.IdentityError):
            return pyrage.x25519.Identity.from_str(line)
    return None


def _identity_text(identity: StrPath) -> str | None:
    if isinstance(identity, str) and "SECRET-KEY-" in identity.upper():
        return identity
    with suppress(KeyFileError, UnicodeDecodeError):
        return read_file(identity, _MAX_IDENTITY_BYTES).decode("utf-8")
    return None
