"""Parses the command line, runs one command and turns errors into exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from diffveil._version import __version__
from diffveil.cli import build as _build
from diffveil.cli import distill as _distill
from diffveil.cli import fuse as _fuse
from diffveil.cli import identities as _identities
from diffveil.cli import key as _key
from diffveil.cli import surrogates as _surrogates
from diffveil.cli import verify as _verify
from diffveil.cli.exits import ExitCode, exit_code_of
from diffveil.cli.secret import add_opening, add_sealing

__all__ = ["build_parser", "main"]

EXITS = """\
exit status:
  0 done    2 usage    3 no face found    4 wrong passphrase or identity
  5 a photo, key file or bundle is broken or does not match    1 anything else
"""

OVERVIEW = """\
Protects the faces in photos: anonymize makes them strangers, hide changes them for people but
not for the recognizer you authorise, recover gives them back to whoever can open the key.
"""

START = f"""\
a first round trip:
  diffveil anonymize group.jpg --key group.veilkey     asks for a passphrase, twice
  diffveil recover group-anonymized.jpg --key group.veilkey

`diffveil COMMAND --help` shows every option with examples; `diffveil doctor` what is installed.

{EXITS}"""

EXAMPLES = {
    "anonymize": """\
examples:
  diffveil anonymize group.jpg
      writes group-anonymized.jpg; its recovery key is discarded: diffveil cannot go back
  diffveil anonymize group.jpg --key group.veilkey
      keeps the way back, sealed to a passphrase that is asked for
  diffveil anonymize holiday/ -o shared/ --key keys/ --recipient age1…
      a folder of photos; only the holder of that age identity can recover them
  diffveil anonymize 'cam-*.png' -o out/ --passphrase-file pass.txt --key keys/ --json
      for scripts: no question, one JSON object a photo
  diffveil anonymize portrait.jpg --variants 4 --seed 7
      four different strangers, portrait-anonymized-1.jpg … -4.jpg, the same at every run
  diffveil anonymize group.jpg --carry
      no key file: the new faces carry the old ones, and the passphrase alone recovers them
  diffveil anonymize album/ -o out/ --pseudonym secret.txt --people team/
      Ada in team/ada.jpg becomes the same stranger in every photo of album/
""",
    "hide": """\
examples:
  diffveil hide badge.jpg --key badge.veilkey
      people see somebody else; the bundle's own recognizer still sees the same person
  diffveil hide gallery/ -o hidden/
      a folder of photos; their recovery keys are discarded
  diffveil hide badge.jpg --preset paper
      the published recipe: slower, the yardstick for the default
""",
    "recover": """\
examples:
  diffveil recover group-anonymized.jpg --key group.veilkey
      asks for the passphrase and writes group-anonymized-recovered.jpg
  diffveil recover shared/ --key keys/ --identity me.agekey -o originals/
      a folder; each photo's key is the file of its name in keys/, or those of its faces that the
      identity opens
  diffveil recover group.jpg --key ann.veilkey --key bob.veilkey --identity both.agekey
      two faces whose keys were split; all others stay protected
  diffveil recover group-anonymized.png --carry
      a photo that carries its faces
A wrong passphrase or identity ends with status 4 and writes nothing: there is no wrong face. A key
of another picture, or of this one after lossy encoding, ends with status 5 (see --reencoded). With
--carry nothing tells a wrong passphrase from the right one: it gives the faces of strangers.
""",
    "inspect": """\
examples:
  diffveil inspect group.veilkey     how it is sealed; opens nothing
  diffveil inspect my-bundle/        shape, programs, licence; checks every file's hash
""",
    "doctor": """\
example:
  diffveil doctor      versions, the backends of this machine, which one is chosen and why
  diffveil doctor --verify
      also whether every backend that can run here computes what it should
""",
    "export": """\
examples:
  diffveil export stable-diffusion/ -o my-bundle/ --msi embeddings.pt --recognizer irse50.pt
      a diffusers folder, the research release's MSI weights, an ArcFace recognizer
  diffveil export owner/name -o my-bundle/ --msi msi.pt --recognizer w600k_r50.onnx --dry-run
      a model of the hub or its cache; says what would be made and in about how long
  diffveil export v1-5.safetensors -o my-bundle/ --msi msi.pt --recognizer a.pt --vision clip/
      one file in the original layout, with a CLIP vision tower
  diffveil export sd/ -o b/ --msi m.pt --recognizer a.pt --lora lcm.safetensors --precision float16
      a fused adapter, float16 for GPUs; --recognizer again makes an ensemble
Nothing in a pickled file is run. The bundle is verified against PyTorch, whole or not at all.
""",
    "build": _build.EXAMPLES,
    "key": _key.EXAMPLES,
    "distill-guide": _distill.EXAMPLES,
    "fuse-step": _fuse.EXAMPLES,
    "add-surrogates": _surrogates.EXAMPLES,
    "verify": _verify.EXAMPLES,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what follows the program's name; `sys.argv` where None.

    Returns:
        The exit code. Misuse that argparse finds ends the process with 2, as argparse does.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _never_fail_to_print()
    try:
        args = build_parser(arguments).parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = import_module(args.module).run
        return int(run(args))
    except KeyboardInterrupt:
        print("diffveil: interrupted; files are either complete or untouched", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Python would complain once more when it
        # flushes standard output at the end: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        print(f"diffveil: {error}", file=sys.stderr)
        return code


def build_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of every command; the exporter's own options only when it is asked for.

    Raises:
        BackendUnavailableError: `export` is asked for and its extra is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="diffveil",
        description=OVERVIEW,
        epilog=START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffveil {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, module: str, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=EXAMPLES[name] + "\n" + EXITS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # an abbreviation that works today breaks with a new option
        )
        command.set_defaults(module=f"diffveil.cli.{module}")
        return command

    anonymize = add("anonymize", "protect", "make every face a stranger's")
    _add_protection(anonymize)
    _identities.add_arguments(anonymize)
    _add_protection(add("hide", "protect", "change faces for people, not for the recognizer"))
    _add_recovery(add("recover", "recover", "give the faces back, with their key"))

    _key.add_arguments(add("key", "key", "say who opens a key file, take it apart, import keys"))

    inspect = add("inspect", "inspect", "describe a bundle or a key file, never secrets")
    inspect.add_argument("path", metavar="PATH", help="a bundle's folder or a key file")
    inspect.add_argument("--json", action="store_true", help="one JSON object")

    doctor = add("doctor", "doctor", "show what is installed and which backend is chosen")
    doctor.add_argument("--bundle", metavar="DIR", help="judge for this bundle")
    doctor.add_argument(
        "--verify", action="store_true", help="run its programs and compare with PyTorch's results"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object")

    _verify.add_arguments(
        add("verify", "verify", "check a bundle's files, and its programs on a backend")
    )

    export = add("export", "export", "turn trained weights into a bundle (extra: export)")
    if next((word for word in arguments if not word.startswith("-")), None) == "export":
        from diffveil.cli.export import exporter

        exporter().add_arguments(export)

    _distill.add_arguments(
        add("distill-guide", "distill", "make a bundle's guidance cheap (extra: export)")
    )

    _fuse.add_arguments(
        add("fuse-step", "fuse", "put a sampling step into one program (extra: export)")
    )

    _surrogates.add_arguments(
        add("add-surrogates", "surrogates", "looks for new faces to be drawn with (extra: export)")
    )

    _build.add_arguments(
        add("build", "build", "compile a bundle's programs into engines for GPUs (extra: export)")
    )
    return parser


def _add_protection(parser: argparse.ArgumentParser) -> None:
    _add_files(parser, "PHOTO", "photos, globs or folders")
    sealing = parser.add_argument_group("recovery key")
    sealing.add_argument(
        "--key",
        metavar="KEYFILE",
        help="keep the recovery key in this new file (for several photos: folder); "
        "without it the key is discarded",
    )
    add_sealing(sealing)
    look = parser.add_argument_group("result")
    look.add_argument(
        "--variants", metavar="N", type=_count, default=1, help="different results a photo"
    )
    look.add_argument("--preset", metavar="NAME", help="fast (default), balanced or paper")
    look.add_argument("--steps", metavar="N", type=_count, help="denoising steps of the preset")
    look.add_argument(
        "--strength", metavar="X", type=_share, help="how far from the photo, above 0 up to 1"
    )
    look.add_argument(
        "--seed", metavar="N", type=_seed, help="the same result at every run (default: random)"
    )
    look.add_argument(
        "--on-missing",
        choices=("error", "keep"),
        default="error",
        help="a photo without a face: end with status 3 (default), or keep it as it is",
    )
    _add_machine(parser)


def _add_recovery(parser: argparse.ArgumentParser) -> None:
    _add_files(parser, "PROTECTED", "protected photos, globs or folders")
    opening = parser.add_argument_group("recovery key")
    way = opening.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--key",
        metavar="KEYFILE",
        action="append",
        help="the photo's key file (several, if several people hold its faces), or a folder of "
        "keys named after the photos",
    )
    way.add_argument(
        "--carry",
        dest="module",
        action="store_const",
        const="diffveil.cli.carried",
        help="no key file: the photos carry their faces, see anonymize --carry",
    )
    add_opening(opening)
    opening.add_argument(
        "--reencoded",
        action="store_true",
        help="also take a photo that only looks like the one the key belongs to: after another "
        "lossy encoding, or with other faces recovered already",
    )
    _add_machine(parser)


def _add_files(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    parser.add_argument("photos", metavar=metavar, nargs="+", help=what)
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="a file for one photo, a folder for any number (default: beside each photo; "
        "folders of photos need it); inputs are never overwritten",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a photo, a line each")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument("--bundle", metavar="DIR", help="default: the embedded reference-128")
    machine.add_argument("--backend", metavar="NAME", help="default: the best one, see doctor")
    machine.add_argument(
        "--max-memory", metavar="SIZE", help="memory for the programs, such as 1.5GiB (an estimate)"
    )


def _count(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _seed(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text}") from None


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected above 0 up to 1, got {text}")
    return value


def _never_fail_to_print() -> None:
    # File names may hold what the terminal's encoding cannot say: escape it, do not end with it.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
