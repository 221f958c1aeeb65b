"""What `diffveil fuse-step` does once its arguments are parsed."""

from __future__ import annotations

import argparse
import json

from diffveil.bundle import Bundle
from diffveil.programs import LOOP_PROGRAMS
from diffveil_export.loop_programs import add_loop_programs
from diffveil_export.step import fuse_step

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Fuse; returns the exit code.

    Raises:
        DiffveilError: What went wrong, for the caller to print.
    """
    if args.apart:
        return _apart(args)
    result = fuse_step(Bundle.load(args.bundle), args.output, force=args.force)
    entry = result.program("step")
    worst = max(row.max_rel for row in entry.parity)
    if args.json:
        record = {
            "bundle": str(result.path),
            "parts": list(entry.parts),
            "bytes": entry.file.bytes,
            "parity": worst,
            "fingerprint": result.fingerprint,
        }
        print(json.dumps(record))
        return 0
    print(
        f"step is {' and '.join(entry.parts)} in one graph, {entry.file.bytes / 1e6:.1f} MB, "
        f"within {worst:.1e} of them run one by one"
    )
    print(f"{result.path}: step added, fingerprint {result.fingerprint[:16]} as before")
    return 0


def _apart(args: argparse.Namespace) -> int:
    result = add_loop_programs(Bundle.load(args.bundle), args.output, force=args.force)
    entries = [result.program(name) for name in LOOP_PROGRAMS]
    size, worst = (
        sum(entry.file.bytes for entry in entries),
        max(row.max_rel for entry in entries for row in entry.parity),
    )
    if args.json:
        record = {
            "bundle": str(result.path),
            "programs": list(LOOP_PROGRAMS),
            "bytes": size,
            "parity": worst,
            "fingerprint": result.fingerprint,
        }
        print(json.dumps(record))
        return 0
    print(f"{', '.join(LOOP_PROGRAMS)}: {size / 1e3:.1f} kB, within {worst:.1e} of PyTorch")
    print(f"{result.path}: programs added, fingerprint {result.fingerprint[:16]} as before")
    return 0
