"""Where and with what a benchmark runs."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["commit", "hardware", "load", "versions"]

_ROOT = Path(__file__).parent.parent
_PACKAGES = (
    "diffveil",
    "numpy",
    "pillow",
    "onnxruntime",
    "torch",
    "diffusers",
    "transformers",
)


def hardware() -> dict[str, Any]:
    """Processor, CPUs that this process may use, and memory in GiB."""
    usable = getattr(os, "sched_getaffinity", None)
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cpus": len(usable(0)) if usable else os.cpu_count() or 1,
        "memory_gib": _memory_gib(),
        "system": platform.system(),
    }


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python and of the packages that are installed; `more` names further ones."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Abbreviated commit of the checkout that this file is in; empty if it is in none."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        # Results and documents are what a run writes.
        sources = (".", ":!benchmarks/results", ":!docs")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def load() -> float | None:
    """Processes that wanted a CPU in the last minute, on average."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
