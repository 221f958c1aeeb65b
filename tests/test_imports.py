"""Importing the runtime loads nothing heavy: proven in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {
    "diffusers",
    "diffveil_export",
    "diffveil_kernels",
    "onnx",
    "onnxruntime",
    "pyrage",
    "scipy",
    "tensorrt",
    "torch",
    "transformers",
    "triton",
}


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_diffveil_loads_no_framework_and_no_engine() -> None:
    modules = json.loads(python("import json, sys, diffveil; print(json.dumps(list(sys.modules)))"))
    assert "diffveil.protector" in modules
    assert HEAVY.isdisjoint(name.partition(".")[0] for name in modules)


def test_every_module_of_the_runtime_imports_without_frameworks_and_engines() -> None:
    code = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # importing it raises ImportError
import diffveil
for module in pkgutil.walk_packages(diffveil.__path__, "diffveil."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""
    modules = python(code, *sorted(HEAVY)).split()
    assert {"diffveil.engines.onnxrt", "diffveil.keys", "diffveil.protector"} <= set(modules)
