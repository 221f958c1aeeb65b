"""`diffveil export`: hands over to the exporter, where its extra is installed."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from diffveil.errors import BackendUnavailableError

__all__ = ["NEEDED", "exporter", "missing_packages", "run"]

NEEDED = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
INSTALL = "pip install 'diffveil[export,cpu]'"


def missing_packages() -> list[str]:
    """What the exporter needs and this environment lacks; imports nothing."""
    return [name for name in NEEDED if find_spec(name) is None]


def exporter(command: str = "export", module: str = "cli") -> Any:
    """The exporter's side of a command: a module with `run(args) -> int`.

    Imported by name at run time: the runtime must neither import the exporter nor need it.

    Args:
        command: What the user typed after `diffveil`.
        module: Name of the module in `diffveil_export`.

    Raises:
        BackendUnavailableError: packages of the export extra are missing.
    """
    missing = missing_packages()
    if missing:
        raise BackendUnavailableError(
            f"diffveil {command} needs {', '.join(missing)}, not installed here: {INSTALL}"
        )
    return import_module(f"diffveil_export.{module}")


def run(args: argparse.Namespace) -> int:
    """Exports a bundle with the arguments that the exporter declared."""
    return int(exporter().run(args))
