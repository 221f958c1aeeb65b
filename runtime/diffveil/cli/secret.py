"""Passphrases, identities and recipients: how they are asked for, and what is made of them.

Secrets come from a prompt or a file, never from an argument, which would stand in the shell's
history and in every process listing.
"""

from __future__ import annotations

import argparse
import getpass
import hmac
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from diffveil.cli.exits import UsageError

if TYPE_CHECKING:
    from diffveil.keysecrets import Secret

__all__ = [
    "add_opening",
    "add_sealing",
    "ask_passphrase",
    "opening_secret",
    "passphrase_from_file",
    "readable_file",
    "sealing_secret",
]

_Arguments: TypeAlias = "argparse.ArgumentParser | argparse._ArgumentGroup"

_MAX_PASSPHRASE_FILE = 64 * 1024  # bytes


def add_opening(parser: _Arguments) -> None:
    """Declare what opens a key file; `opening_secret` reads it."""
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument(
        "--passphrase-file",
        metavar="F",
        help="open with the passphrase on the only line of this file (default: ask)",
    )
    secret.add_argument(
        "--identity", metavar="AGE-IDENTITY-FILE", help="open with this age identity instead"
    )


def opening_secret(args: argparse.Namespace) -> Secret:
    """The identity, passphrase file or prompt that the command line names.

    Raises:
        UsageError: the file is missing or unusable, or there is no terminal to ask on.
        OptionError: the passphrase is none.
    """
    from diffveil.keysecrets import Secret

    if args.identity:
        return Secret.to_open(None, _secret_file(args.identity, "--identity")).check()
    if args.passphrase_file:
        return Secret.to_open(passphrase_from_file(args.passphrase_file), None).check()
    return Secret.to_open(ask_passphrase(sealing=False), None).check()


def add_sealing(
    parser: _Arguments, recipient: str = "--recipient", file: str = "--passphrase-file"
) -> None:
    """Declare what a key file is sealed to; `sealing_secret` reads it.

    Args:
        parser: the command's.
        recipient: name of the option for public keys.
        file: name of the option for a file with a passphrase.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        file,
        metavar="F",
        dest="sealing_file",
        help="seal with the passphrase on the only line of this file (default: ask)",
    )
    group.add_argument(
        recipient,
        metavar="age1…",
        dest="recipient",
        action="append",
        help="seal to this age public key instead; may be given several times",
    )
    parser.add_argument(
        "--allow-weak-passphrase",
        action="store_true",
        help="take a passphrase that is easy to guess; whoever gets the file may guess at leisure",
    )


def sealing_secret(args: argparse.Namespace) -> Secret:
    """The recipients, passphrase file or prompt that the command line names, checked.

    Raises:
        UsageError: the file is missing or unusable, or there is no terminal to ask on.
        OptionError: a passphrase is weak and that is not allowed, or a public key is none.
    """
    from diffveil.keysecrets import Secret

    weak: bool = args.allow_weak_passphrase
    if args.recipient:
        return Secret.to_seal(None, args.recipient).check()
    if args.sealing_file:
        passphrase = passphrase_from_file(args.sealing_file)
        return Secret.to_seal(passphrase, (), allow_weak=weak).check()
    return Secret.to_seal(ask_passphrase(sealing=True), (), allow_weak=weak).check()


def readable_file(path: str, option: str) -> Path:
    """The path of an existing file, or an error that names the option.

    Raises:
        UsageError: nothing is there, or it is no file.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{option} {path}: no such file")
    return file


def _secret_file(path: str, option: str) -> Path:
    """As `readable_file`, but not quoting what may be the secret itself.

    Raises:
        UsageError: nothing is there, or it is no file.
    """
    file = Path(path)
    with suppress(OSError, ValueError):  # too long for a name, or with a null character
        if file.is_file():
            return file
    raise UsageError(
        f"{option}: no such file. It takes the name of a file (not repeated here); if that was the "
        "secret itself, it now stands in the shell's history: choose a new one"
    )


def passphrase_from_file(path: str) -> str:
    """The only line of a file; its line ending is not part of the passphrase.

    Raises:
        UsageError: the file is missing, empty, too large, not UTF-8, or has several lines.
    """
    file = _secret_file(path, "--passphrase-file")
    memory = bytearray(_MAX_PASSPHRASE_FILE + 1)
    try:
        with file.open("rb", buffering=0) as stream:
            size = stream.readinto(memory)
        if size > _MAX_PASSPHRASE_FILE:
            raise UsageError(f"--passphrase-file {path}: larger than {_MAX_PASSPHRASE_FILE} bytes")
        text = str(memoryview(memory)[:size], "utf-8")
    except UnicodeDecodeError:
        # Not chained: the decoder's message quotes a byte of the secret.
        raise UsageError(f"--passphrase-file {path}: not UTF-8 text") from None
    finally:
        memory[:] = bytes(len(memory))
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
    passphrase = getpass.getpass("New passphrase: " if sealing else "Passphrase: ")
    if not passphrase:
        raise UsageError("the passphrase is empty")
    if sealing:
        again = getpass.getpass("The same again: ")
        encoding = "utf-8", "surrogatepass"
        if not hmac.compare_digest(again.encode(*encoding), passphrase.encode(*encoding)):
            raise UsageError("the two passphrases differ")
    return passphrase
