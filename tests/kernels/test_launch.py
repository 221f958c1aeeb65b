"""Launching compiled kernels: what reaches the driver, on a device layer that writes it down."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffveil_kernels.calls import Call, StepBuffers, keyed_normal_calls, linear_step_calls
from diffveil_kernels.errors import (
    KernelError,
    KernelInputError,
    KernelRecordError,
    KernelUnavailableError,
)
from diffveil_kernels.launch import CudaCore, KernelLauncher, pack_arguments, record_for
from diffveil_kernels.records import (
    RECORD_FILE,
    KernelRecord,
    dump_records,
    read_cubin,
    read_records,
)
from diffveil_kernels.specs import PARTS, SPECS
from kernel_tools import in_own_process

CUBIN = b"\x7fELF no real one"


def record_of(name: str, target: int = 80, arch: str = "") -> KernelRecord:
    spec = SPECS[name]
    return KernelRecord(
        name=name,
        entry=spec.function,
        target=target,
        arch=arch or f"sm_{target}",
        parameters=spec.parameters,
        hidden=("global_scratch", "profile_scratch"),
        constants=dict(spec.constants),
        num_warps=spec.num_warps,
        threads=32 * spec.num_warps,
        shared=64,
        source_sha256="0" * 64,
        triton="3.9.0",
        file=f"{name}.sm{target}.cubin",
        sha256=sha256(CUBIN).hexdigest(),
        bytes=len(CUBIN),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [record_of(name) for name in SPECS]
    for record in records:
        (tmp_path / record.file).write_bytes(CUBIN)
    (tmp_path / RECORD_FILE).write_bytes(dump_records(records))
    return tmp_path


@dataclass
class WritingDown:
    """A device layer without a device."""

    capability: int = 86
    loaded: list[str] = field(default_factory=list)
    launched: list[tuple[Any, ...]] = field(default_factory=list)

    def load(self, cubin: bytes, entry: str) -> str:
        assert cubin == CUBIN
        self.loaded.append(entry)
        return entry

    def launch(
        self,
        function: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: Any,
        arguments: Sequence[np.number[Any]],
    ) -> None:
        raw = b"".join(argument.tobytes() for argument in arguments)
        self.launched.append((function, grid, threads, shared, stream, raw))


def test_calls_reach_the_driver_in_order_with_every_byte(folder: Path) -> None:
    device = WritingDown()
    launcher = KernelLauncher(folder, device)
    launcher.run(keyed_normal_calls(0x1000, 0xFFFF_FFFF_0000, 3, 1025), "stream")
    launcher.run(keyed_normal_calls(0x1000, 0x2000, 1, 16), "stream")
    assert device.loaded == ["keyed_normal"]  # once
    first, second = device.launched
    assert first[:5] == ("keyed_normal", (3, 2, 1), 64, 64, "stream")
    # Two pointers, an i32, and the two null pointers that Triton's kernels end with.
    expected = [0x1000, 0xFFFF_FFFF_0000]
    assert first[5] == np.array(expected, "<u8").tobytes() + np.int32(1025).tobytes() + bytes(16)
    assert second[1] == (1, 1, 1)


def test_kernels_of_another_version_are_refused(folder: Path) -> None:
    record = record_of("keyed_normal")
    smaller = {**record.constants, "BLOCKS": int(record.constants["BLOCKS"]) // 2}
    fewer = replace(record, parameters=record.parameters[:-1])
    for other in (replace(record, constants=smaller), fewer):
        (folder / RECORD_FILE).write_bytes(dump_records([other]))
        device = WritingDown()
        with pytest.raises(KernelRecordError, match="another version of diffveil"):
            KernelLauncher(folder, device).run(keyed_normal_calls(1, 2, 3, 16), None)
        assert not device.launched


def test_a_step_names_its_tensors_in_the_kernels_order(folder: Path) -> None:
    device = WritingDown()
    tensors = StepBuffers(*(0x100 * (k + 1) for k in range(12)))
    calls = linear_step_calls(tensors, 0xAAA, 0xBBB, rows=2, channels=4, plane=4096)
    KernelLauncher(folder, device).run(calls, None)
    squares, step = device.launched
    assert squares[:2] == ("sum_of_squares", (2, PARTS, 1))
    assert step[:2] == ("linear_step", (2, 32, 1))
    names = [name for name, _ in SPECS["linear_step"].parameters]
    values = np.frombuffer(step[5][: 8 * 14], "<u8").tolist()
    given = dict(zip(names, values, strict=False))
    assert given == {
        **{name: getattr(tensors, name) for name in StepBuffers.__dataclass_fields__},
        "sums": 0xAAA,
        "out": 0xBBB,
    }
    assert np.frombuffer(step[5][8 * 14 : 8 * 14 + 8], "<i4").tolist() == [16384, 4096]
    assert step[5][8 * 14 + 8 :] == bytes(16)
    plain = linear_step_calls(tensors, 0, 1, rows=2, channels=4, plane=64, normalised=False)
    assert [call.kernel for call in plain] == ["linear_step"]


@given(value=st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.none(), st.text(max_size=3)))
@settings(deadline=None)
def test_an_argument_fits_its_parameter_or_is_refused(value: Any) -> None:
    kinds = {"*fp32": (0, 2**64), "i32": (-(2**31), 2**31), "i64": (-(2**63), 2**63)}
    for kind, (low, high) in kinds.items():
        record = replace(record_of("keyed_normal"), parameters=(("x", kind),))
        if isinstance(value, int) and low <= value < high:
            packed = pack_arguments(record, [value])
            assert int(packed[0]) == value
            assert [p.nbytes for p in packed] == [4 if kind == "i32" else 8, 8, 8]
        else:
            with pytest.raises(KernelInputError, match=r"x: \w+ does not fit"):
                pack_arguments(record, [value])


def test_nothing_is_launched_where_one_call_is_wrong(folder: Path) -> None:
    device = WritingDown()
    good = keyed_normal_calls(1, 2, 1, 16)
    for wrong in (Call("keyed_normal", (1, 1, 1), (1, 2)), Call("blur", (1, 1, 1), ())):
        with pytest.raises(KernelError):
            KernelLauncher(folder, device).run([*good, wrong], None)
    assert device.launched == []


def test_arguments_pass_through_cuda_core_unchanged() -> None:
    """What cuda-core itself makes of them, which needs no GPU."""
    handler = pytest.importorskip("cuda.core._kernel_arg_handler")
    parameters = (("a", "*i8"), ("b", "i32"), ("c", "i64"), ("d", "fp32"), ("e", "fp64"))
    record = replace(record_of("keyed_normal"), parameters=parameters)
    packed = pack_arguments(record, [2**64 - 3, -5, -(2**40), 0.1, 0.1])
    holder = handler.ParamHolder(packed)
    pointers = ctypes.cast(holder.ptr, ctypes.POINTER(ctypes.c_void_p))
    for index, value in enumerate(packed):
        assert ctypes.string_at(pointers[index], value.nbytes) == value.tobytes()


def test_the_kernel_of_the_gpus_own_kind_is_taken() -> None:
    records = [
        *(record_of("keyed_normal", target) for target in (80, 86, 87, 89)),
        *(record_of("keyed_normal", target, f"sm_{target}a") for target in (90, 100, 120)),
        record_of("linear_step", 75),
    ]

    def target(capability: int) -> int:
        return record_for(records, "keyed_normal", capability).target

    assert [target(c) for c in (80, 86, 87, 89, 90, 100, 120)] == [80, 86, 87, 89, 90, 100, 120]
    assert record_for(records[:2], "keyed_normal", 89).target == 86  # an earlier one runs
    for capability in (75, 103, 110, 121):  # the compiler has no such target to offer
        with pytest.raises(KernelUnavailableError, match=r"kernels for 8\.0, .* 12\.0 only"):
            target(capability)
    with pytest.raises(KernelUnavailableError, match="--target 90"):
        record_for(records[:2], "keyed_normal", 90)
    with pytest.raises(KernelUnavailableError):
        record_for(records[:2], "keyed_normal", 87)  # Tegra: only its own


def test_without_a_gpu_it_says_so() -> None:
    pytest.importorskip("cuda.core")
    with pytest.raises(KernelUnavailableError, match="no CUDA device 1000"):
        CudaCore(1000)


def test_launching_needs_neither_triton_nor_pytorch(folder: Path) -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["torch"] = None  # importing them raises ImportError
from pathlib import Path
import diffveil_kernels.geometry, diffveil_kernels.traffic
from diffveil_kernels.reference.keyed_normal import key_words, keyed_normal
from diffveil_kernels.calls import keyed_normal_calls
from diffveil_kernels.launch import KernelLauncher
class Device:
    capability = 80
    def load(self, cubin, entry): return entry
    def launch(self, *arguments): print(arguments[0])
KernelLauncher(Path(sys.argv[1]), Device()).run(keyed_normal_calls(1, 2, 3, 4), None)
assert keyed_normal(key_words([bytes(32)]), 3).shape == (1, 3)
assert not any(name.partition(".")[0] == "diffveil" for name in sys.modules)
"""
    assert in_own_process(code, str(folder)).strip() == "keyed_normal"


# --- records --------------------------------------------------------------------------------------


def test_records_survive_the_file(folder: Path) -> None:
    assert read_records(folder) == tuple(
        sorted((record_of(n) for n in SPECS), key=lambda r: r.name)
    )
    assert (folder / RECORD_FILE).read_bytes() == dump_records(read_records(folder))


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_no_damage_to_a_record_gets_through(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    record = record_of("keyed_normal")
    content = json.loads(dump_records([record]))
    entry = content["kernels"][0]
    name = data.draw(st.sampled_from(sorted(entry)))
    bad = st.sampled_from([None, -1, 1.5, [], "", {}, [["x"]], "../x", "a/b", True])
    wrong = data.draw(bad)
    if (name, wrong) in (("constants", {}), ("parameters", []), ("hidden", [])):
        return
    entry[name] = wrong
    (folder / RECORD_FILE).write_text(json.dumps(content))
    if name in ("name", "entry", "arch", "triton") and isinstance(wrong, str) and wrong:
        (read,) = read_records(folder)  # a word may be any word
        assert replace(read, **{name: getattr(record, name)}) == record
    else:
        with pytest.raises(KernelRecordError, match="compile the kernels again"):
            read_records(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"nul", b"[" * 100_000, b'{"format": "x"}', b"\xff", b"1" * 2**21],
)
def test_what_is_no_record_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / RECORD_FILE).write_bytes(content)
    with pytest.raises(KernelRecordError, match="--kernels"):
        read_records(tmp_path)


def test_a_newer_record_is_told_apart(folder: Path) -> None:
    path = folder / RECORD_FILE
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(KernelRecordError, match="version 2, this diffveil reads 1"):
        read_records(folder)


def test_a_damaged_kernel_is_not_loaded(folder: Path) -> None:
    record = record_of("keyed_normal")
    device = WritingDown()
    file = folder / record.file
    for damaged in (CUBIN[:-1], CUBIN + b"x", CUBIN[:-1] + b"X"):
        file.write_bytes(damaged)
        with pytest.raises(KernelRecordError, match="differs from its record"):
            KernelLauncher(folder, device).run(keyed_normal_calls(1, 2, 1, 1), None)
    file.unlink()
    with pytest.raises(KernelRecordError, match="No such file"):
        read_cubin(folder, record)
    with pytest.raises(KernelRecordError, match="no compiled kernels"):
        KernelLauncher(folder / "none", device)
    assert device.loaded == []


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_what_somebody_else_could_have_written_is_not_loaded(folder: Path) -> None:
    record = record_of("keyed_normal")
    for path in (folder, folder / RECORD_FILE, folder / record.file):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        with pytest.raises(KernelRecordError, match="written by everybody"):
            KernelLauncher(folder, WritingDown()).run(keyed_normal_calls(1, 2, 1, 1), None)
        path.chmod(mode)
    file = folder / record.file
    file.rename(folder / "elsewhere")
    file.symlink_to(folder / "elsewhere")
    with pytest.raises(KernelRecordError, match="compile the kernels again"):
        read_cubin(folder, record)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(KernelRecordError, match="not a plain file"):
        read_cubin(folder, record)
