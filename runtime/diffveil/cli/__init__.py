"""The command line `diffveil`. Its option names, JSON fields and exit codes are contracts."""

from __future__ import annotations

from diffveil.cli.main import main

__all__ = ["main"]
