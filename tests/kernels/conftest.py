"""Kernels run interpreted here, and are compiled in processes of their own."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from diffveil_kernels.specs import SPECS
from kernel_tools import COMPILED_TARGETS, in_own_process

NEEDS_TRITON = (
    "test_aot.py",
    "test_keyed_normal.py",
    "test_linear_step.py",
    "test_faces.py",
    "test_kernel_benchmark.py",
)
collect_ignore = [] if find_spec("triton") else list(NEEDS_TRITON)

if find_spec("triton"):
    # Triton decides at decoration whether a function is interpreted: ours are, its own are not,
    # as in a process that had imported Triton for something else before.
    import triton.language  # noqa: F401

    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import kernel_probes  # noqa: F401
    from diffveil_kernels.jit import faces, keyed_normal, linear_step  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Face kernels in large programs: interpreted, each operation takes as long as a small one."""
    for name, spec in SPECS.items():
        if spec.module == "faces":
            constants = {**spec.constants, "BLOCK": 1024}
            monkeypatch.setitem(SPECS, name, replace(spec, constants=constants))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kernel compiled for `COMPILED_TARGETS`."""
    folder = tmp_path_factory.mktemp("kernels")
    code = """
import sys
from pathlib import Path
from diffveil_kernels.aot import compile_kernels
compile_kernels(Path(sys.argv[1]), map(int, sys.argv[2:]))
assert "torch" not in sys.modules
"""
    in_own_process(code, str(folder), *map(str, COMPILED_TARGETS))
    return folder
