"""`diffveil key`: who opens a key file, one file a face, keys of the research release."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffveil.cli.exits import UsageError
from diffveil.cli.paths import FACE, KEY_SUFFIX
from diffveil.cli.secret import (
    add_opening,
    add_sealing,
    opening_secret,
    readable_file,
    sealing_secret,
)

if TYPE_CHECKING:
    from diffveil.keys import RecoveryKey
    from diffveil.keysecrets import Secret

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  diffveil key show group.veilkey --identity me.agekey
      the faces it recovers, who else can open it, what made it
  diffveil key reseal group.veilkey --identity me.agekey --add age1… --remove age1…
      other recipients, in place; the picture is not needed. Old copies still open: delete them
  diffveil key split group.veilkey -o keys/ --identity me.agekey --holder 0=age1… --holder 1=age1…
      keys/group.face-0.veilkey and so on: each holder recovers one face, the others stay protected
  diffveil key join ann.veilkey bob.veilkey -o both.veilkey --identity both.agekey --to age1…
      one key of the faces of several
  diffveil key import-research 39_embedding.pt 39_zt.pt --photo 39.jpg --bundle sd15/ -o 39.veilkey
      the research release's files, sealed; delete them afterwards, they are the face
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `diffveil key`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        return actions.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )

    show = add("show", "open a key file and say what it is, but nothing secret")
    show.add_argument("key", metavar="KEYFILE")
    show.add_argument("--json", action="store_true", help="one JSON object")
    add_opening(show)

    reseal = add("reseal", "seal a key file to other recipients or another passphrase")
    reseal.add_argument("key", metavar="KEYFILE")
    reseal.add_argument("-o", "--output", metavar="NEW", help="a new file (default: in place)")
    add_opening(reseal)
    reseal.add_argument(
        "--add", metavar="age1…", action="append", default=[], help="one recipient more"
    )
    reseal.add_argument(
        "--remove", metavar="age1…", action="append", default=[], help="one recipient less"
    )
    add_sealing(reseal, "--to", "--to-passphrase-file")

    split = add("split", "write a key file for each face, or for those that get a holder")
    split.add_argument("key", metavar="KEYFILE")
    split.add_argument("-o", "--output", metavar="FOLDER", required=True, help="for the new files")
    add_opening(split)
    split.add_argument(
        "--holder",
        metavar="FACE=age1…",
        action="append",
        default=[],
        help="seal this face (0 is the first) to this age public key; may be given several times",
    )
    add_sealing(split, "--to", "--to-passphrase-file")

    join = add("join", "write one key file of the faces of several")
    join.add_argument("key", metavar="KEYFILE", nargs="+")
    join.add_argument("-o", "--output", metavar="NEW", required=True, help="the new file")
    add_opening(join)
    add_sealing(join, "--to", "--to-passphrase-file")

    research = add("import-research", "seal the research release's key files")
    research.add_argument("embedding", metavar="EMBEDDING.pt", help="key-E: ten conditionings")
    research.add_argument("noise_map", metavar="ZT.pt", help="key-I: one noise map")
    research.add_argument(
        "--photo", metavar="PHOTO", required=True, help="the protected photo: one aligned face"
    )
    research.add_argument(
        "--bundle", metavar="DIR", required=True, help="exported from the weights that made them"
    )
    research.add_argument("--steps", metavar="N", type=int, help="of DDIM (default: 100)")
    research.add_argument("-o", "--output", metavar="NEW", required=True, help="the new file")
    add_sealing(research)


def run(args: argparse.Namespace) -> int:
    """Run one action.

    Raises:
        UsageError: the command line cannot be meant; nothing was written.
        DiffveilError: see `diffveil.errors`; nothing was written.
    """
    actions: dict[str, Callable[[argparse.Namespace], None]] = {
        "show": _show,
        "reseal": _reseal,
        "split": _split,
        "join": _join,
        "import-research": _import_research,
    }
    actions[args.action](args)
    return 0


def _show(args: argparse.Namespace) -> None:
    with _opened(args.key, opening_secret(args)) as key:
        record: dict[str, Any] = {
            "path": args.key,
            "faces": [face.number for face in key.faces],
            "recipients": list(key.recipients),
            "photo_size": list(key.photo_size),
            "pictures": len(key.pictures),
            "bundle": key.bundle,
            "sampler": key.sampler,
            "steps": key.steps,
            "backend": key.backend,
            "precision": key.precision,
        }
    if args.json:
        print(json.dumps(record))
        return
    for name, value in record.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name.ljust(10)}  {text}")


def _reseal(args: argparse.Namespace) -> None:
    if (args.add or args.remove) and (args.recipient or args.sealing_file):
        raise UsageError("--add and --remove change the recipients, --to… names new ones: choose")
    target = None if args.output is None else _new_file(args.output)
    opening = opening_secret(args)
    from diffveil.keyaccess import reseal_with
    from diffveil.keysecrets import Secret

    sealing = None if args.add or args.remove else sealing_secret(args)
    path = readable_file(args.key, "KEYFILE")
    add, remove = Secret.to_seal(None, args.add), Secret.to_seal(None, args.remove)
    now = reseal_with(path, opening, sealing, add=add, remove=remove, target=target)
    sealed_to = f"{len(now)} recipient{'s' if len(now) != 1 else ''}" if now else "a passphrase"
    print(f"{target or path}: sealed to {sealed_to}; copies of the old file still open")


def _split(args: argparse.Namespace) -> None:
    holders: dict[int, list[str]] = {}
    for text in args.holder:
        number, equals, recipient = text.partition("=")
        if not equals or not number.isdecimal():
            raise UsageError("--holder: expected FACE=age1…, such as 0=age1…")
        holders.setdefault(int(number), []).append(recipient)
    if holders and (args.recipient or args.sealing_file):
        raise UsageError("--holder gives each face its own recipients, --to… all the same: choose")
    opening = opening_secret(args)
    from diffveil.keysecrets import Secret

    secrets = {n: Secret.to_seal(None, some).check() for n, some in holders.items()}
    shared = None if secrets else sealing_secret(args)
    with _opened(args.key, opening) as key:
        parts = (key.select(secrets) if secrets else key).split()
        stem = Path(args.key).name.removesuffix(KEY_SUFFIX)
        places = [
            _new_file(Path(args.output) / f"{stem}.{FACE}-{part.faces[0].number}{KEY_SUFFIX}")
            for part in parts
        ]
        Path(args.output).mkdir(parents=True, exist_ok=True)
        for part, place in zip(parts, places, strict=True):
            secret = shared or secrets[part.faces[0].number]
            part.seal_with(place, secret, overwrite=False)
            print(f"{place}: face {part.faces[0].number}")


def _join(args: argparse.Namespace) -> None:
    target = _new_file(args.output)
    opening, sealing = opening_secret(args), sealing_secret(args)
    from diffveil.keys import RecoveryKey

    with RecoveryKey.join([_opened(path, opening) for path in args.key]) as key:
        key.seal_with(target, sealing, overwrite=False)
        faces = ", ".join(str(face.number) for face in key.faces)
    print(f"{target}: faces {faces}")


def _import_research(args: argparse.Namespace) -> None:
    target = _new_file(args.output)
    sealing = sealing_secret(args)
    from diffveil.bundle import Bundle
    from diffveil.research import RESEARCH_STEPS, import_research_key

    with import_research_key(
        Bundle.load(args.bundle),
        Path(args.photo),
        Path(args.embedding),
        Path(args.noise_map),
        steps=RESEARCH_STEPS if args.steps is None else args.steps,
    ) as key:
        key.seal_with(target, sealing, overwrite=False)
    print(
        f"{target}: sealed; {args.embedding} and {args.noise_map} still are the face: delete them"
    )


def _opened(path: str, secret: Secret) -> RecoveryKey:
    from diffveil.keys import RecoveryKey

    return RecoveryKey.open_with(readable_file(path, "KEYFILE"), secret)


def _new_file(path: str | Path) -> Path:
    """A key file that does not exist: what an overwritten one recovers would be lost with it."""
    file = Path(path)
    if file.exists():
        raise UsageError(f"{file}: exists already; name another file")
    return file
