"""What `diffveil build` does once its arguments are parsed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from diffveil.bundle import Bundle
from diffveil.cli.progress import ProgressBar
from diffveil_export.engines.builder import BuildOptions, BuildResult, build_engines
from diffveil_export.engines.kernels import build_kernels
from diffveil_export.engines.trt_api import NativeOptions, load_builder

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Build; returns the exit code.

    Raises:
        DiffveilError: What went wrong, for the caller to print.
    """
    options = BuildOptions(
        targets=tuple(args.target),
        batch=tuple(args.batch),
        programs=tuple(args.programs) if args.programs else None,
        weights=args.weights,
        native=NativeOptions(
            memory_mib=args.memory,
            refittable=args.refittable,
            strip_weights=args.strip_weights,
            weight_streaming=args.weight_streaming,
            timing_cache=None if args.timing_cache is None else Path(args.timing_cache),
        ),
        force=args.force,
        dry_run=args.dry_run,
    )
    bundle = Bundle.load(args.bundle)
    if args.kernels:
        build_kernels(args, bundle)
    if args.backend is None:
        return 0
    builder = load_builder(args.backend)
    with ProgressBar("building") as bar:

        def done(result: BuildResult) -> None:
            line = json.dumps(_record(result)) if args.json else _line(result)
            bar.message(line, sys.stdout)

        def progress(label: str, at: int, total: int) -> None:
            bar.label = label
            bar(at, total)

        results = build_engines(bundle, builder, options, done=done, progress=progress)
    if not args.json:
        sys.stdout.write(_summary(results) + "\n")
    return 0


def _record(result: BuildResult) -> dict[str, object]:
    record = result.record
    return {
        "program": result.program,
        "target": result.target,
        "status": result.status,
        "reason": result.reason,
        "path": str(result.path),
        "bytes": None if record is None else record.bytes,
        "sha256": None if record is None else record.sha256,
        "seconds": None if record is None else record.seconds,
    }


def _line(result: BuildResult) -> str:
    start = f"{result.program:<10}{result.target:<7}{result.status:<8}"
    if result.record is None:
        return f"{start}{result.reason}"
    size = f"{result.record.bytes / 1e6:7.1f} MB"
    if result.status == "cached":
        return f"{start}{size}"
    return f"{start}{size}{result.record.seconds:7.1f} s   {result.reason}"


def _summary(results: tuple[BuildResult, ...]) -> str:
    folders = dict.fromkeys(str(result.path.parent) for result in results)
    counts = [
        f"{sum(r.status == status for r in results)} {status}"
        for status in ("built", "cached", "planned")
        if any(r.status == status for r in results)
    ]
    return f"{', '.join(counts)} in {', '.join(folders)}"
