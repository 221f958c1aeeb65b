"""`diffveil inspect`: what a bundle or a key file is, without anything secret."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffveil.cli.exits import UsageError

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Prints a bundle's manifest summary, or what a key file says before it is opened.

    Raises:
        UsageError: nothing is at the path.
        BundleError: the bundle is broken.
        KeyFileError: the file is no key file.
    """
    path = Path(args.path)
    if path.name == "bundle.json":
        path = path.parent
    if path.is_dir():
        record = describe_bundle(path)
    elif path.is_file():
        from diffveil.keys import inspect_keyfile

        record = {"kind": "key file", "path": str(path), **inspect_keyfile(path)}
    else:
        raise UsageError(f"{path}: no such file or folder")
    if args.json:
        print(json.dumps(record, allow_nan=False))
    else:
        print("\n".join(_lines(record)))
    return 0


def describe_bundle(path: Path) -> dict[str, Any]:
    """A bundle's shape, provenance and programs; every file is checked against its hash."""
    from diffveil.bundle import Bundle

    bundle = Bundle.load(path)
    bundle.verify(full=True)
    manifest = bundle.manifest
    return {
        "kind": "bundle",
        "path": str(path),
        "name": bundle.name,
        "fingerprint": bundle.fingerprint,
        "licence": manifest.licence,
        "dimensions": asdict(manifest.dimensions),
        "schedule": asdict(manifest.schedule),
        "prediction": manifest.prediction,
        "thresholds": dict(manifest.thresholds),
        "provenance": dict(manifest.provenance),
        "programs": {
            name: {
                "file": program.file.name,
                "bytes": program.file.bytes,
                "weights": list(program.data),
                "precision": program.precision,
                **({"parts": list(program.parts)} if program.parts else {}),
                **({"loss_scale": program.loss_scale} if program.loss_scale else {}),
                **(asdict(program.cost) if program.cost else {}),
                # How far the worst output was from PyTorch at export, relative to its range.
                "parity": max((record.max_rel for record in program.parity), default=None),
            }
            for name, program in sorted(manifest.programs.items())
        },
        "bytes": sum(entry.bytes for entry in manifest.all_files()),
    }


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    width = max((len(name) for name in value), default=0)
    lines = []
    for name, content in value.items():
        if isinstance(content, dict) and content:
            lines.append(f"{indent}{name}")
            lines += _lines(content, indent + "  ")
        else:
            if isinstance(content, (list, tuple)):
                content = ", ".join(str(item) for item in content)
            lines.append(f"{indent}{name.ljust(width)}  {content}")
    return lines
