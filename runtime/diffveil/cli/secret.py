"""Passphrases and identities: from a prompt or a file, never from an argument.

An argument would stand in the shell's history and in every process listing.
"""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from diffveil.cli.exits import UsageError

__all__ = ["ask_passphrase", "passphrase_from_file", "readable_file"]

_MAX_PASSPHRASE_FILE = 64 * 1024  # bytes


def readable_file(path: str, option: str) -> Path:
    """The path of an existing file, or an error that names the option.

    Raises:
        UsageError: nothing is there, or it is no file.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{option} {path}: no such file")
    return file


def passphrase_from_file(path: str) -> str:
    """The only line of a file; its line ending is not part of the passphrase.

    Raises:
        UsageError: the file is missing, empty, too large, not UTF-8, or has several lines.
    """
    file = readable_file(path, "--passphrase-file")
    if file.stat().st_size > _MAX_PASSPHRASE_FILE:
        raise UsageError(f"--passphrase-file {path}: larger than {_MAX_PASSPHRASE_FILE} bytes")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        # Not chained: the decoder's message quotes a byte of the secret.
        raise UsageError(f"--passphrase-file {path}: not UTF-8 text") from None
    passphrase = text.removesuffix("\n").removesuffix("\r")
    if not passphrase:
        raise UsageError(f"--passphrase-file {path}: the file is empty")
    if "\n" in passphrase or "\r" in passphrase:
        raise UsageError(f"--passphrase-file {path}: expected one line, found several")
    return passphrase


def ask_passphrase(*, sealing: bool) -> str:
    """Asks on the terminal; twice when sealing, where a slip would lock the owner out.

    Raises:
        UsageError: there is no terminal to ask on, nothing was typed, or the two differ.
    """
    if not sys.stdin.isatty():
        ways = (
            "--passphrase-file FILE or --recipient age1…"
            if sealing
            else ("--passphrase-file FILE or --identity FILE")
        )
        raise UsageError(f"no terminal to ask for the passphrase on: give {ways}")
    passphrase = getpass.getpass("Passphrase: ")
    if not passphrase:
        raise UsageError("the passphrase is empty")
    if sealing and getpass.getpass("The same again: ") != passphrase:
        raise UsageError("the two passphrases differ")
    return passphrase
