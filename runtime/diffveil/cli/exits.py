"""Exit codes of the command line, and which error ends with which."""

from __future__ import annotations

from enum import IntEnum

from diffveil.errors import (
    BundleError,
    DiffveilError,
    KeyFileError,
    KeyMismatchError,
    NoFaceError,
    OptionError,
    PhotoError,
    WrongSecretError,
)

__all__ = ["ExitCode", "UsageError", "WriteError", "exit_code_of"]


class ExitCode(IntEnum):
    """What a script can tell from the exit status. Argparse's own status for misuse is 2 too."""

    DONE = 0
    FAILED = 1  # anything not named below: a backend that is missing, a full disk
    USAGE = 2
    NO_FACE = 3
    WRONG_SECRET = 4
    BROKEN_FILE = 5
    INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class UsageError(Exception):
    """The command line asks for something that cannot be meant; nothing was done."""


class WriteError(Exception):
    """A result cannot be written; neither the photo nor the key it belongs to is to blame."""


# Subclasses stand before their bases: the first match decides.
_CODES: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (UsageError, ExitCode.USAGE),
    (OptionError, ExitCode.USAGE),
    (NoFaceError, ExitCode.NO_FACE),
    (WrongSecretError, ExitCode.WRONG_SECRET),
    (KeyFileError, ExitCode.BROKEN_FILE),
    (KeyMismatchError, ExitCode.BROKEN_FILE),
    (PhotoError, ExitCode.BROKEN_FILE),
    (BundleError, ExitCode.BROKEN_FILE),
    (WriteError, ExitCode.FAILED),
    (DiffveilError, ExitCode.FAILED),
    (OSError, ExitCode.FAILED),
)


def exit_code_of(error: BaseException) -> ExitCode | None:
    """The exit code that an expected error ends with; None for an error that is a bug."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return None
