"""Reading files that strangers may have sent, and writing files that only the owner may read."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from diffveil.errors import KeyFileError, OptionError

__all__ = ["StrPath", "read_file", "write_private"]

StrPath: TypeAlias = "str | os.PathLike[str]"

# Opening a pipe that nobody writes to would wait for ever before it could be refused.
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_file(path: StrPath, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        KeyFileError: it is missing, unreadable, not a regular file or too large.
    """
    name = os.fspath(path)
    try:
        with open(os.open(name, _READ_FLAGS), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise KeyFileError(f"{name} is not a regular file.")
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise KeyFileError(f"Cannot read {name}: {_reason(error)}.") from error
    if len(data) > limit:
        raise KeyFileError(f"{name} is larger than {limit} bytes and is not read.")
    return data


def write_private(path: StrPath, data: bytes, *, overwrite: bool = True) -> None:
    """Write a file that only its owner may read (0600), completely or not at all.

    Args:
        path: where to; the folder must exist.
        data: the contents.
        overwrite: replace a file that is already there.

    Raises:
        OptionError: the file exists and `overwrite` is false.
        KeyFileError: it cannot be written; what was there before is untouched.
    """
    target = Path(path)
    temporary = ""
    try:
        if not overwrite and os.path.lexists(target):
            raise OptionError(f"{target} already exists and is not replaced: choose another name.")
        # mkstemp creates with 0600, so the contents are at no time readable by others.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name[:40]}.", dir=target.parent)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        temporary = ""
    except OptionError:
        raise  # it is a ValueError too
    except (OSError, ValueError) as error:
        raise KeyFileError(f"Cannot write {target}: {_reason(error)}.") from error
    finally:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the system lets a folder be opened for that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "not a valid path"
