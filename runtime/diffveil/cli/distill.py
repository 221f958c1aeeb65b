"""`diffveil distill-guide`: declares its options, and hands over to the exporter."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffveil.cli.export import exporter

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  diffveil distill-guide my-bundle/ photos/ -o my-fast-bundle/
      half an hour on photos of many people; the more people, the better
  diffveil distill-guide my-bundle/ crops/ --aligned -o my-bundle/ --force --minutes 60
      crops of single faces, aligned as the bundle's template says; replaces the bundle
  diffveil distill-guide my-bundle/ photos/ -o fast/ --checkpoint distill.ckpt
      keeps its state; the same command goes on after an interruption
  diffveil distill-guide my-bundle/ --student distill.safetensors -o fast/
      no training: adds the recognizer that an earlier run kept with --keep

Guidance is most of the time of anonymize and hide, because its gradient goes through the decoder.
A recognizer that reads latents needs no decoder. It is trained here to see what the bundle's own
recognizer sees, and joins the bundle as the program guide_latent. Plans with through="latent" then
use it: of the presets fast and balanced when they anonymize with bundles that have no denoise_few
or no surrogates. Recovery keys stay valid. Measure protection afterwards: benchmarks.quality does.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `diffveil distill-guide`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `diffveil export` wrote")
    parser.add_argument(
        "photos", metavar="PHOTOS", nargs="*", help="photos or folders of photos, searched deeply"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--aligned", action="store_true", help="each photo is one face, aligned already"
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="time to train (default: %(default)g)"
    )
    parser.add_argument(
        "--width",
        type=int,
        default=64,
        help="channels of the network: more sees better and costs more (default: %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=64,
        metavar="N",
        help="faces to measure on rather than learn from (default: %(default)s)",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="keep and resume training")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="also write the trained recognizer here"
    )
    parser.add_argument(
        "--student", type=Path, metavar="FILE", help="use this recognizer, train nothing"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Trains and adds the program with the arguments declared here.

    Raises:
        BackendUnavailableError: packages of the export extra are missing.
    """
    return int(exporter("distill-guide", "distill_cli").run(args))
