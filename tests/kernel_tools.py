"""Kernels are compiled in processes of their own: those of the tests interpret them."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["COMPILED_TARGETS", "in_own_process"]

COMPILED_TARGETS = (80, 120)  # one that later GPUs of its generation run, and one bound to its own


def in_own_process(code: str, *arguments: str) -> str:
    """Output of Python code where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
