"""Mean of low-rank changes that one training run left at several steps.

    python recipes/reference/mix_changes.py A.safetensors B.safetensors … -o stranger.safetensors

Each of them errs in its own way: their mean draws better than any (Wortsman et al., arXiv
2203.05482). The factors are averaged, not their products, which is right only for changes that are
near each other: stages of one run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import load_change, write_change


def mean_change(changes: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Mean of every factor.

    Raises:
        SystemExit: The changes are not of one network and rank.
    """
    shapes = [{name: value.shape for name, value in change.items()} for change in changes]
    if any(shape != shapes[0] for shape in shapes):
        sys.exit("these changes are not stages of one run: their factors have other shapes")
    return {name: torch.stack([c[name] for c in changes]).mean(0) for name in changes[0]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("changes", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    write_change(args.output, mean_change([load_change(file) for file in args.changes]))
    print(f"wrote {args.output}: the mean of {len(args.changes)}")


if __name__ == "__main__":
    main()
