"""Kernels compiled ahead of time: without a GPU, without PyTorch, the same bytes every time."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from diffveil_kernels.aot import compile_kernel, compile_kernels
from diffveil_kernels.errors import KernelInputError, KernelUnavailableError
from diffveil_kernels.records import read_cubin, read_records
from diffveil_kernels.specs import SPECS, TARGETS
from kernel_tools import COMPILED_TARGETS, in_own_process


def test_every_kernel_is_there_for_every_target(compiled: Path) -> None:
    records = read_records(compiled)
    assert {(r.name, r.target) for r in records} == {
        (name, target) for name in SPECS for target in COMPILED_TARGETS
    }
    for record in records:
        cubin = read_cubin(compiled, record)
        assert cubin.startswith(b"\x7fELF")
        assert hashlib.sha256(cubin).hexdigest() == record.sha256
        assert record.entry.encode() in cubin
        assert record.threads == 32 * record.num_warps
        assert record.parameters == SPECS[record.name].parameters
        assert record.arch == f"sm_{record.target}" + "a" * (record.target >= 90)
    assert {path.name for path in compiled.iterdir()} == {
        "kernels.json",
        *(record.file for record in records),
    }


def test_cubins_declare_the_parameters_that_a_launch_passes(compiled: Path) -> None:
    """The loader's own view: sizes and offsets of `cuLaunchKernel`'s arguments in the ELF."""
    from triton import knobs

    sizes = {"i32": 4, "i64": 8, "fp32": 4, "fp64": 8}
    for record in read_records(compiled):
        dump = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-elf", str(compiled / record.file)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        expected, offset = [], 0
        for kind in [*(kind for _, kind in record.parameters), *("*i8" for _ in record.hidden)]:
            size = sizes.get(kind, 8)
            offset = -(-offset // size) * size
            expected.append((offset, size))
            offset += size
        assert sorted(parameters_of(dump)) == expected, record.name


def parameters_of(dump: str) -> list[tuple[int, int]]:
    """Offset and size of every EIATTR_KPARAM_INFO that cuobjdump prints."""
    found = re.findall(r"Ordinal : \S+\s+Offset  : (\S+)\s+Size    : (\S+)", dump)
    return [(int(offset, 16), int(size, 16)) for offset, size in found]


def test_nothing_is_contracted_to_fused_multiply_adds(compiled: Path) -> None:
    """Else the device would round other than the CPU does."""
    code = """
import sys, triton
from triton.backends.compiler import GPUTarget
from diffveil_kernels.specs import SPECS
from importlib import import_module
for name in sys.argv[1:]:
    spec = SPECS[name]
    fn = getattr(import_module("diffveil_kernels.jit." + spec.module), spec.function)
    signature = dict(spec.parameters) | dict.fromkeys(spec.constants, "constexpr")
    source = triton.compiler.ASTSource(fn, signature, dict(spec.constants))
    options = {"num_warps": spec.num_warps, "enable_fp_fusion": False}
    print(triton.compile(source, target=GPUTarget("cuda", 89, 32), options=options).asm["ptx"])
"""
    ptx = in_own_process(code, "keyed_normal", "linear_step", "sum_of_squares")
    assert "fma." not in ptx
    assert "approx" not in ptx
    assert ".full" not in ptx
    assert "3FE62E42FEFA39EF" in ptx.upper()  # ln 2, not rounded to float32 on the way
    assert {"div.rn.f64", "sqrt.rn.f64", "mul.rn.f64", "add.rn.f64"} <= set(ptx.split())


def test_compiling_again_gives_the_same_bytes(compiled: Path, tmp_path: Path) -> None:
    code = """
import sys, os
os.environ["TRITON_CACHE_DIR"] = sys.argv[2]
from pathlib import Path
from diffveil_kernels.aot import compile_kernels
compile_kernels(Path(sys.argv[1]), [80], names=["linear_step"])
"""
    in_own_process(code, str(tmp_path / "out"), str(tmp_path / "cache"))
    (again,) = read_records(tmp_path / "out")
    assert again in read_records(compiled)
    assert b"/" + Path(__file__).parts[1].encode() + b"/" not in read_cubin(tmp_path / "out", again)


def test_stale_kernels_go_and_misuse_is_told_apart(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from diffveil_kernels.aot import compile_kernels
folder = Path(sys.argv[1])
compile_kernels(folder, [80, 86], names=["sum_of_squares"])
compile_kernels(folder, [86], names=["sum_of_squares"])
"""
    in_own_process(code, str(tmp_path))
    (record,) = read_records(tmp_path)
    assert record.target == 86
    assert len(list(tmp_path.glob("*.cubin"))) == 1
    with pytest.raises(KernelInputError, match="75 asked for"):
        compile_kernels(tmp_path, [75])
    with pytest.raises(KernelInputError, match="blur asked for"):
        compile_kernels(tmp_path, [86], names=["blur"])
    with pytest.raises(KernelUnavailableError, match="unset it"):
        compile_kernel(SPECS["sum_of_squares"], 86)  # interpreted in this process
    assert read_records(tmp_path) == (record,)


@pytest.mark.slow
def test_every_target_compiles(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from diffveil_kernels.aot import compile_kernels
compile_kernels(Path(sys.argv[1]))
"""
    in_own_process(code, str(tmp_path))
    assert len(read_records(tmp_path)) == len(SPECS) * len(TARGETS)
