"""Compiles the kernels ahead of time, for GPUs that need not be there. Needs Triton."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from diffveil_kernels.errors import KernelInputError, KernelRecordError, KernelUnavailableError
from diffveil_kernels.records import RECORD_FILE, KernelRecord, dump_records
from diffveil_kernels.specs import SPECS, TARGETS, KernelSpec

__all__ = ["compile_kernel", "compile_kernels"]

# What Triton passes to every kernel after its own parameters (`backends/nvidia/
# driver.c` of 3.9: "+ 2 for global & profile scratch"); other versions are held against it.
_HIDDEN = ("global_scratch", "profile_scratch")
_MAX_SHARED = 48 * 1024  # bytes; more must be asked for at every launch
_PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32", "fp64": "f64"}


def compile_kernels(
    folder: Path,
    targets: Iterable[int] = TARGETS,
    *,
    names: Iterable[str] | None = None,
    done: Callable[[KernelRecord], None] | None = None,
) -> tuple[KernelRecord, ...]:
    """Compile kernels into a folder, with a record of each; they replace what was there.

    The record file changes last: until then the kernels that were there stay valid.

    Args:
        folder: Created if it does not exist.
        targets: Compute capabilities, of `TARGETS`.
        names: Kernels, of `SPECS`; None for all.
        done: Told each kernel when it is compiled.

    Raises:
        KernelInputError: A target or a name does not exist.
        KernelUnavailableError: Triton is not installed, or was told to interpret.
        KernelRecordError: This version of Triton compiles to something that cannot be launched.
        OSError: The folder cannot be written.
    """
    targets, wanted = tuple(dict.fromkeys(targets)), tuple(SPECS if names is None else names)
    unknown = [str(t) for t in targets if t not in TARGETS] + [n for n in wanted if n not in SPECS]
    if unknown or not targets or not wanted:
        raise KernelInputError(
            f"kernels: {', '.join(unknown) or 'nothing'} asked for; there are targets "
            f"{', '.join(map(str, TARGETS))} and kernels {', '.join(SPECS)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for target in targets:
        for name in wanted:
            record, cubin = compile_kernel(SPECS[name], target)
            _replace(folder / record.file, cubin)
            records.append(record)
            if done is not None:
                done(record)
    _replace(folder / RECORD_FILE, dump_records(records))
    kept = {record.file for record in records}
    for stale in folder.glob("*.cubin"):
        if stale.name not in kept:
            stale.unlink()
    return tuple(records)


def compile_kernel(spec: KernelSpec, target: int) -> tuple[KernelRecord, bytes]:
    """Compile one kernel.

    Args:
        spec: The kernel.
        target: Compute capability, 89 for 8.9.

    Returns:
        Its record, and the cubin.

    Raises:
        KernelUnavailableError: Triton is not installed, or was told to interpret.
        KernelRecordError: This version of Triton compiles to something that cannot be launched.
    """
    triton = _triton()
    source = getattr(import_module(f"diffveil_kernels.jit.{spec.module}"), spec.function)
    if not isinstance(source, triton.runtime.JITFunction):
        raise KernelUnavailableError("TRITON_INTERPRET is set: unset it to compile kernels")
    signature = dict(spec.parameters) | dict.fromkeys(spec.constants, "constexpr")
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # paths of the machine that compiles
        compiled = triton.compile(
            triton.compiler.ASTSource(source, signature, dict(spec.constants)),
            target=triton.backends.compiler.GPUTarget("cuda", target, 32),
            # Fused multiply-adds would round differently from the CPU.
            options={"num_warps": spec.num_warps, "enable_fp_fusion": False},
        )
    cubin, meta = bytes(compiled.asm["cubin"]), compiled.metadata
    arch = _check_entry(compiled.asm["ptx"], meta, spec)
    digest = hashlib.sha256(cubin).hexdigest()
    record = KernelRecord(
        name=spec.name,
        entry=meta.name,
        target=target,
        arch=arch,
        parameters=spec.parameters,
        hidden=_HIDDEN,
        constants=dict(spec.constants),
        num_warps=meta.num_warps,
        threads=32 * meta.num_warps,
        shared=meta.shared,
        source_sha256=source.cache_key,
        triton=triton.__version__,
        file=f"{spec.name}.sm{target}.{digest[:16]}.cubin",
        sha256=digest,
        bytes=len(cubin),
    )
    return record, cubin


def _triton() -> Any:
    try:
        import triton
        import triton.backends.compiler
        import triton.compiler
        import triton.runtime
    except ImportError as error:
        raise KernelUnavailableError(
            "compiling kernels needs Triton, not installed here: pip install triton"
        ) from error
    return triton


def _check_entry(ptx: str, meta: Any, spec: KernelSpec) -> str:
    """Hold the compiled entry point against what a launch will pass; returns its architecture."""
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*\.reqntid (\d+)", ptx, re.DOTALL)
    arch = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    declared = re.findall(r"\.param \.(\w+)", entry.group(2)) if entry else []
    expected = [_PTX_TYPES.get(kind, "u64") for _, kind in spec.parameters]
    expected += ["u64"] * len(_HIDDEN)
    problems = []
    if entry is None or arch is None or declared != expected:
        problems.append(f"it takes {declared}, expected {expected}")
    elif entry.group(1) != meta.name or int(entry.group(3)) != 32 * meta.num_warps:
        problems.append("its entry point is not the one that was compiled")
    if meta.global_scratch_size or meta.profile_scratch_size:
        problems.append("it needs scratch memory")
    if meta.shared > _MAX_SHARED:
        problems.append(f"it needs {meta.shared} bytes of shared memory, over {_MAX_SHARED}")
    if meta.num_ctas != 1 or meta.launch_cooperative_grid or meta.launch_pdl:
        problems.append("it needs another kind of launch")
    if problems or arch is None:
        raise KernelRecordError(
            f"{spec.name}: Triton {meta.triton_version} compiled something that cannot be "
            f"launched: {'; '.join(problems)}"
        )
    return arch.group(1)


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
