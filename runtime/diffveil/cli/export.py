"""`diffveil export`: hands over to the exporter, where its extra is installed."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from diffveil.errors import BackendUnavailableError

__all__ = ["NEEDED", "exporter", "missing_packages"]

NEEDED = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
INSTALL = "pip install 'diffveil[export,cpu]'"


def missing_packages() -> list[str]:
    """What the exporter needs and this environment lacks; imports nothing."""
    return [name for name in NEEDED if find_spec(name) is None]


def exporter() -> Any:
    """The exporter's command line: `add_arguments(parser)` and `run(args) -> int`.

    Imported by name at run time: the runtime must neither import the exporter nor need it.

    Raises:
        BackendUnavailableError: packages of the export extra are missing.
    """
    missing = missing_packages()
    if missing:
        raise BackendUnavailableError(
            f"diffveil export needs {', '.join(missing)}, not installed here: {INSTALL}"
        )
    return import_module("diffveil_export.cli")


def run(args: argparse.Namespace) -> int:
    """Exports a bundle with the arguments that the exporter declared."""
    return int(exporter().run(args))
