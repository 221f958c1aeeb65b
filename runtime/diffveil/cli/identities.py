"""What `--carry`, `--pseudonym` and `--people` of `diffveil anonymize` ask for."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffveil.cli.exits import UsageError
from diffveil.cli.paths import find_photos
from diffveil.cli.secret import ask_passphrase, passphrase_from_file

if TYPE_CHECKING:
    from diffveil.protector import Protector
    from diffveil.pseudonyms import People

__all__ = ["add_arguments", "options", "plan"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `anonymize` that `hide` does not have."""
    group = parser.add_argument_group("carried faces and pseudonyms")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--carry",
        action="store_true",
        help="the photo itself carries the old faces: no key file, the passphrase alone recovers "
        "them (asked for, or --passphrase-file)",
    )
    kind.add_argument(
        "--pseudonym",
        metavar="FILE",
        help="a person becomes the same new face in all photos, by the secret on this file's only "
        "line, and another one by another secret",
    )
    group.add_argument(
        "--people",
        metavar="FOLDER",
        help="with --pseudonym: photos of the people to tell apart, NAME.jpg or NAME/*.jpg "
        "(default: the photos of the command are matched with each other)",
    )


def plan(args: argparse.Namespace) -> str | None:
    """The secret that carrying or pseudonyms need; None where neither is asked for.

    Raises:
        UsageError: options contradict each other, or there is no secret.
    """
    if args.command != "anonymize":
        return None
    carry, pseudonym = args.carry, args.pseudonym
    if args.people and not pseudonym:
        raise UsageError("--people tells people apart for pseudonyms: add --pseudonym FILE")
    if not carry and not pseudonym:
        return None
    if args.variants != 1 or any((args.preset, args.steps, args.strength)) or args.seed is not None:
        raise UsageError(
            "--variants, --preset, --steps, --strength and --seed do not go with --carry and "
            "--pseudonym"
        )
    if pseudonym:
        return passphrase_from_file(pseudonym)
    if args.key or args.recipient:
        raise UsageError("--carry makes no key file: leave out --key and --recipient")
    if args.sealing_file:
        return passphrase_from_file(args.sealing_file)
    return ask_passphrase(sealing=True)


def options(
    args: argparse.Namespace, secret: str, protector: Protector, photos: list[Path]
) -> dict[str, Any]:
    """What to pass to `Protector.anonymize`.

    Raises:
        UsageError: `--people` has no photos.
    """
    from diffveil.secretkeys import secret_key

    key = secret_key(secret)
    if args.carry:
        return {"carry": True, "secret": key}
    return {"pseudonym": key, "people": _people(args.people, protector, photos)}


def _people(folder: str | None, protector: Protector, photos: list[Path]) -> People:
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    if folder is None:
        return _met(protector, photos)
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"--people {folder}: no such folder")
    entries = sorted(root.iterdir())
    for entry in entries:
        for photo in find_photos([str(entry)]) if entry.is_dir() else [entry]:
            faces = protector.embed(photo if isinstance(photo, Path) else photo.path)
            found[entry.name if entry.is_dir() else entry.stem].extend(faces.embeddings)
    if not found:
        raise UsageError(f"--people {folder}: holds no photos")
    return {name: np.stack(own) for name, own in found.items()}


def _met(protector: Protector, photos: list[Path]) -> People:
    """The people whom a command's photos show, each as first met."""
    from diffveil.errors import PhotoError
    from diffveil.pseudonyms import as_met

    faces: list[np.ndarray] = []
    for photo in photos:
        try:
            faces.extend(protector.embed(photo, on_missing="keep").embeddings)
        except PhotoError:
            continue  # reported where it is protected
    return as_met(faces, protector.bundle)
