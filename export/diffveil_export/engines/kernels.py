"""What `diffveil build --kernels` does: device kernels, compiled ahead of time beside a bundle.

Kernels depend on no bundle. They lie in one all the same, beside its engines, where
`diffveil_kernels.launch` is pointed at.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from diffveil.bundle import Bundle
from diffveil.cli.progress import ProgressBar
from diffveil.errors import EngineError, OptionError
from diffveil_export.engines.trt_api import PRESENT
from diffveil_kernels.aot import compile_kernels
from diffveil_kernels.errors import KernelError
from diffveil_kernels.records import KernelRecord
from diffveil_kernels.specs import SPECS, TARGETS

__all__ = ["KERNELS_FOLDER", "build_kernels", "kernel_targets"]

KERNELS_FOLDER = "kernels"


def build_kernels(args: argparse.Namespace, bundle: Bundle) -> Path:
    """Compile kernels as `diffveil build` was asked to; returns their folder.

    Raises:
        OptionError: There is no kernel for a target.
        EngineError: Kernels could not be compiled.
        OSError: The bundle's folder cannot be written.
    """
    targets = kernel_targets(args.target, engines_too=args.backend is not None)
    folder = bundle.path / KERNELS_FOLDER
    total = len(SPECS) * len(targets)
    if args.dry_run:
        sys.stdout.write(f"{total} kernels planned in {folder}\n" if not args.json else "")
        return folder
    done = 0
    with ProgressBar("compiling") as bar:

        def tell(record: KernelRecord) -> None:
            nonlocal done
            done += 1
            line = json.dumps(_summary(record)) if args.json else _line(record)
            bar.message(line, sys.stdout)
            bar(done, total)

        try:
            compile_kernels(folder, targets, done=tell)
        except KernelError as error:
            raise EngineError(f"kernels: {error}") from error
    if not args.json:
        sys.stdout.write(f"{total} kernels in {folder}\n")
    return folder


def kernel_targets(words: list[str], *, engines_too: bool = False) -> tuple[int, ...]:
    """Targets of kernels by the words of ``--target``, such as ``89``, ``8.9`` or ``sm89``.

    Args:
        words: ``present`` stands for all targets: kernels for other GPUs do no harm.
        engines_too: Whether engines are built for the same targets; there may be some that no
            kernel is compiled for, and these are passed over.

    Raises:
        OptionError: There is no kernel for a target.
    """
    if words == [PRESENT]:
        return TARGETS
    targets = []
    for word in words:
        match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", word)
        target = int(match.group(1) + match.group(2)) if match else 0
        if target in TARGETS:
            targets.append(target)
        elif not (engines_too and (match or word == PRESENT)):
            raise OptionError(
                f"target: no kernels for '{word}', only for {', '.join(map(str, TARGETS))}"
            )
    return tuple(targets) or TARGETS


def _summary(record: KernelRecord) -> dict[str, object]:
    return {
        "kernel": record.name,
        "target": f"sm{record.target}",
        "status": "built",
        "file": record.file,
        "bytes": record.bytes,
        "sha256": record.sha256,
    }


def _line(record: KernelRecord) -> str:
    return f"{record.name:<18}sm{record.target:<7}{record.bytes / 1e3:7.1f} kB"
