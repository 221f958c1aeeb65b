"""Secrets as people hand them in: passphrases, age recipients and age identities.

Everything is checked before age sees it, and nothing is ever quoted in an error: to paste an
identity where a recipient or a path belongs is an easy mistake, and error texts end up in logs. For
the same reason no error is raised here while one is handled that carries the text itself
(`UnicodeEncodeError` does).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from diffveil.errors import BackendUnavailableError, KeyFileError, OptionError
from diffveil.privatefile import StrPath, read_file

__all__ = [
    "MAX_IDENTITIES",
    "MAX_RECIPIENTS",
    "MIN_PASSPHRASE_CHARACTERS",
    "check_passphrase",
    "generate_identity",
    "load_pyrage",
    "parse_identities",
    "parse_recipients",
]

MAX_RECIPIENTS = 128
MAX_IDENTITIES = 32
MIN_PASSPHRASE_CHARACTERS = 8
_MIN_DISTINCT_CHARACTERS = 4
_MAX_PASSPHRASE_BYTES = 1024
_MAX_IDENTITY_BYTES = 64 << 10

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


def check_passphrase(passphrase: str, *, allow_weak: bool) -> None:
    """Refuse what is no passphrase and, unless allowed, what is a weak one.

    The rule is a floor, not a measure: at least 8 characters, 4 of them different.

    Raises:
        OptionError: it is empty, not encodable, too long or (unless `allow_weak`) weak.
    """
    if not passphrase.strip():
        raise OptionError("The passphrase is empty.")
    try:
        size = len(passphrase.encode("utf-8"))
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= _MAX_PASSPHRASE_BYTES or "\0" in passphrase:
        raise OptionError(
            f"The passphrase must be at most {_MAX_PASSPHRASE_BYTES} bytes of UTF-8 without NUL."
        )
    if allow_weak:
        return
    if len(passphrase) < MIN_PASSPHRASE_CHARACTERS:
        short = f"fewer than {MIN_PASSPHRASE_CHARACTERS} characters"
    elif len(set(passphrase)) < _MIN_DISTINCT_CHARACTERS:
        short = f"fewer than {_MIN_DISTINCT_CHARACTERS} different characters"
    else:
        return
    raise OptionError(
        f"The passphrase has {short}. Whoever gets the key file can guess at it without limit: use "
        "several random words (or pass allow_weak_passphrase=True, for tests)."
    )


def parse_recipients(recipients: Sequence[str]) -> list[Any]:
    """Parse public keys into pyrage recipients; the same one given twice counts once.

    Raises:
        OptionError: there are too many, or one is not an age X25519 public key.
    """
    pyrage = load_pyrage()
    unique = list(dict.fromkeys(recipient.strip() for recipient in recipients))
    if len(unique) > MAX_RECIPIENTS:
        raise OptionError(f"{len(unique)} recipients are given; at most {MAX_RECIPIENTS} can be.")
    parsed = []
    for number, text in enumerate(unique, start=1):
        recipient = None
        if _RECIPIENT.fullmatch(text):
            with suppress(pyrage.RecipientError):
                recipient = pyrage.x25519.Recipient.from_str(text)
        if recipient is None:
            raise OptionError(f"Recipient {number} is not an age X25519 public key (age1…).")
        parsed.append(recipient)
    return parsed


def parse_identities(identity: StrPath) -> list[Any]:
    """Parse identities into pyrage identities.

    Args:
        identity: `AGE-SECRET-KEY-1…` lines (`#` comments), or the path of a file of them.

    Raises:
        OptionError: it is neither, or a line is not an identity.
    """
    pyrage = load_pyrage()
    identities = []
    for number, raw in enumerate(_identity_text(identity).splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        parsed = None
        if _IDENTITY.fullmatch(line):
            with suppress(pyrage.IdentityError):
                parsed = pyrage.x25519.Identity.from_str(line)
        if parsed is None:
            raise OptionError(f"Line {number} of the identity is not an AGE-SECRET-KEY-1… key.")
        identities.append(parsed)
    if not 1 <= len(identities) <= MAX_IDENTITIES:
        raise OptionError(
            f"The identity holds {len(identities)} keys; it must hold 1 to {MAX_IDENTITIES}."
        )
    return identities


def _identity_text(identity: StrPath) -> str:
    if isinstance(identity, str) and "SECRET-KEY-" in identity.upper():
        return identity
    text: str | None = None
    with suppress(KeyFileError, UnicodeDecodeError):
        text = read_file(identity, _MAX_IDENTITY_BYTES).decode("utf-8")
    if text is None:
        raise OptionError(
            "The identity is neither AGE-SECRET-KEY-1… text nor a readable text file of at most "
            f"{_MAX_IDENTITY_BYTES} bytes that holds it."
        )
    return text
