"""`diffveil build`: declares its options, and hands over to the exporter, where it is installed."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec

from diffveil.errors import BackendUnavailableError, OptionError

__all__ = ["EXAMPLES", "add_arguments", "run"]

# The exporter's own packages that a build needs; PyTorch is not among them.
NEEDED = ("onnx", "onnx_ir")
NEEDED_FOR_KERNELS = ("triton",)

EXAMPLES = """\
examples:
  diffveil build my-bundle/ --backend tensorrt-rtx --target 86,89,120
      engines for RTX 30, 40 and 50 GPUs; the machine that builds them needs no GPU
  diffveil build my-bundle/ --backend tensorrt-rtx
      engines for the GPU that is here
  diffveil build my-bundle/ --backend tensorrt --batch 1,2,16
      TensorRT, for the GPU that is here: calls of 1 to 16 faces, tuned for 2
  diffveil build my-bundle/ --backend tensorrt-rtx --target 89 --programs denoise,guide
      the two programs that take the time
  diffveil build my-bundle/ --backend tensorrt-rtx --target 89 --dry-run
      what would be built, and why
  diffveil build my-bundle/ --kernels
      device kernels for every GPU generation from 8.0 to 12.0; no GPU is needed

Engines go to BUNDLE/engines/BACKEND-VERSION-TARGET/, kernels to BUNDLE/kernels/. Engines that have
not changed are not built again.
An engine is code, and so is a kernel: build them yourself, never take them from strangers.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `diffveil build`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `diffveil export` wrote")
    parser.add_argument(
        "--backend",
        choices=("tensorrt-rtx", "tensorrt"),
        help="tensorrt-rtx: RTX GPUs, built anywhere; tensorrt: the GPU that is here",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="compile device kernels, for --target or for all that there are; with --backend, "
        "engines too",
    )
    what = parser.add_argument_group("what to build")
    what.add_argument(
        "--target",
        metavar="CC,…",
        type=_words,
        default=["present"],
        help="compute capabilities, such as 86,89,120, or present (default: present); "
        "an engine runs on its own target only",
    )
    what.add_argument(
        "--batch",
        metavar="N,…",
        type=_numbers,
        default=[1, 4, 8],
        help="faces of one call: smallest, usual (tuned for), largest; two: smallest and largest; "
        "one: that and no other (default: 1,4,8)",
    )
    what.add_argument(
        "--programs", metavar="NAME,…", type=_words, help="only these programs (default: all)"
    )
    how = parser.add_argument_group("how to build")
    how.add_argument(
        "--weights",
        choices=("folded", "stored"),
        default="folded",
        help="folded: weights in the dtype that is computed with; stored: int8 weights stay int8 "
        "in the engine, which is smaller; those in four bits are restored (default: %(default)s)",
    )
    how.add_argument("--memory", metavar="MiB", type=int, help="most scratch memory of an engine")
    how.add_argument("--refittable", action="store_true", help="weights can be replaced later")
    how.add_argument(
        "--strip-weights", action="store_true", help="leave weights out; refit before running"
    )
    how.add_argument(
        "--weight-streaming", action="store_true", help="weights may stay in host memory"
    )
    how.add_argument(
        "--timing-cache",
        metavar="FILE",
        help="read and rewrite measured kernels (tensorrt): the next build is quicker",
    )
    parser.add_argument("--force", action="store_true", help="build what is up to date too")
    parser.add_argument("--dry-run", action="store_true", help="say what would be built, and why")
    parser.add_argument("--json", action="store_true", help="one JSON object an engine")


def run(args: argparse.Namespace) -> int:
    """Builds engines or kernels with the arguments declared here.

    Raises:
        OptionError: It is not said what to build.
        BackendUnavailableError: packages of the export extra are missing.
    """
    if args.backend is None and not args.kernels:
        raise OptionError("say what to build: engines for a --backend, or --kernels")
    needed = (NEEDED if args.backend else ()) + (NEEDED_FOR_KERNELS if args.kernels else ())
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        extras = ",".join(["export", *([args.backend] if args.backend else [])])
        raise BackendUnavailableError(
            f"diffveil build needs {', '.join(missing)}, not installed here: "
            f"pip install 'diffveil[{extras}]'"
        )
    # By name at run time: the runtime must neither import the exporter nor need it.
    return int(import_module("diffveil_export.engines.cli").run(args))


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise argparse.ArgumentTypeError(f"expected names with commas between, got '{text}'")
    return words


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas between, got '{text}'"
        ) from None
