"""`diffveil add-surrogates`: declares its options, and hands over to the exporter."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffveil.cli.export import exporter

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  diffveil add-surrogates my-bundle/ photos/ -o my-better-bundle/
      photos of many people; the more people, the better every face finds a look that fits
  diffveil add-surrogates my-bundle/ crops/ --aligned -o my-bundle/ --force
      crops of single faces, aligned as the bundle's template says; replaces the bundle

A surrogate is the mean of what the bundle's embedder sees in a few people who are held and lit
alike: the look of somebody who does not exist. Presets fast and balanced draw new faces with one
that fits the photo; faces come out more natural than those that are made up from nothing. No face
can be read back from a mean, but whoever is among so few may leave a trace: use photos of people
who agreed to it. Recovery keys of the bundle stay valid. Measure protection afterwards:
benchmarks.quality does.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `diffveil add-surrogates`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `diffveil export` wrote")
    parser.add_argument(
        "photos", metavar="PHOTOS", nargs="+", help="photos or folders of photos, searched deeply"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--aligned", action="store_true", help="each photo is one face, aligned already"
    )
    parser.add_argument(
        "--count", type=int, default=2048, metavar="N", help="surrogates (default: %(default)s)"
    )
    parser.add_argument(
        "--people",
        type=int,
        default=4,
        metavar="N",
        help="people that each is the mean of: more are more anonymous and blander "
        "(default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Makes and adds the surrogates with the arguments declared here.

    Raises:
        BackendUnavailableError: packages of the export extra are missing.
    """
    return int(exporter("add-surrogates", "surrogates_cli").run(args))
