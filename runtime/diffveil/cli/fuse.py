"""`diffveil fuse-step`: declares its options, and hands over to the exporter."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffveil.cli.export import exporter

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  diffveil fuse-step my-bundle/ -o my-fused-bundle/
      a copy that also holds the program step
  diffveil fuse-step my-bundle/ -o my-bundle/ --force
      replaces the bundle
  diffveil fuse-step my-bundle/ -o my-gpu-bundle/ --apart
      for GPUs: a copy that also holds predict, steer and advance; then diffveil build

One sampling step calls denoise, then guide_latent (or guide), then adds up in NumPy. The program
step is all of that in one graph, made from the bundle's own programs and sharing their weights, so
it needs neither PyTorch weights nor training. It is held against its parts before it is kept.
Plans with one gradient at every step then run through it. Recovery keys of the bundle stay valid.
Measure whether it pays on your machine: benchmarks.cpu does.

With --apart the networks stay programs of their own, and only what is computed between them joins
the bundle, without weights. GPU backends are then handed whole loops of any plan, inversion and
recovery too, and wait once for each.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `diffveil fuse-step`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `diffveil export` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--apart",
        action="store_true",
        help="instead of step add predict, steer and advance, which need no copy of the weights",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Fuses with the arguments declared here.

    Raises:
        BackendUnavailableError: packages of the export extra are missing.
    """
    return int(exporter("fuse-step", "fuse_cli").run(args))
