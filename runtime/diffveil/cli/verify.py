"""`diffveil verify`: hashes of a bundle, and its programs against PyTorch's golden outputs."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from diffveil.cli.exits import ExitCode

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  diffveil verify my-bundle/
      every file against its hash, then every program against PyTorch on this machine
  diffveil verify my-bundle/ --backend cpu --programs denoise,guide --json
      two programs, for scripts: one JSON object an output
A difference above the tolerance ends with status 5.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `diffveil verify`."""
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        nargs="?",
        help="folder that `diffveil export` wrote (default: the embedded bundle)",
    )
    parser.add_argument(
        "--backend", metavar="NAME", help="what runs the programs (default: the best one here)"
    )
    parser.add_argument(
        "--programs",
        metavar="NAME,…",
        type=lambda text: [word.strip() for word in text.split(",")],
        help="only these programs (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object an output")


def run(args: argparse.Namespace) -> int:
    """Verify; returns the exit code.

    Raises:
        BundleError: the bundle is broken or has no golden data.
        BackendUnavailableError: the backend cannot be used here.
    """
    from diffveil.bundle import Bundle
    from diffveil.engines import select_backend
    from diffveil.golden import check_backend
    from diffveil.parity import TOLERANCES

    bundle = Bundle.load(None if args.bundle is None else Path(args.bundle))
    bundle.verify(full=True)
    backend = select_backend(args.backend, bundle).require()
    on_terminal = sys.stderr.isatty()

    def progress(name: str) -> None:
        if on_terminal:
            print(f"running {name} on {backend.name}", file=sys.stderr)

    rows = check_backend(bundle, backend, programs=args.programs, progress=progress)
    if args.json:
        for row in rows:
            record = {**asdict(row), "backend": backend.name, "ok": bool(row)}
            print(json.dumps({k: _finite(v) for k, v in record.items()}, allow_nan=False))
    else:
        print(f"{bundle.name} on {backend.name}: all files as their hashes say")
        print(
            f"{'program':<10}{'output':<14}{'batch':>5}{'max rel':>10}{'allowed':>10}"
            f"{'PSNR dB':>9}{'cosine':>10}{'norm':>8}  {'dtype':<9}"
        )
        for row in rows:
            psnr = "exact" if row.psnr is None else f"{row.psnr:.1f}"
            allowed = TOLERANCES[row.precision].max_rel
            print(
                f"{row.program:<10}{row.output:<14}{row.batch:>5}{row.max_rel:>10.1e}"
                f"{allowed:>10.1e}{psnr:>9}{row.cosine:>10.6f}{row.norm_ratio:>8.4f}"
                f"  {row.precision:<9}{'' if row else '  DIFFERS'}"
            )
    if all(rows):
        return ExitCode.DONE
    print(
        f"diffveil: backend '{backend.name}' computes something else than PyTorch did when the "
        "bundle was exported: do not use it with this bundle",
        file=sys.stderr,
    )
    return ExitCode.BROKEN_FILE


def _finite(value: object) -> object:
    """JSON knows no infinity: null stands for it."""
    return None if isinstance(value, float) and value in (float("inf"), -float("inf")) else value
