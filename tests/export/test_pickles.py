"""Pickled PyTorch files are read without running anything in them."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.models.msi import MSI
from diffveil_export.sources.msi_weights import read_msi
from diffveil_export.sources.pickles import read_pickled_tensors


class Attachment(nn.Module):
    """A class that the reader cannot import."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.BatchNorm1d(4))
        self.scale = nn.Parameter(torch.randn(2, 3).T)
        self.register_buffer("halves", torch.randn(5).half())
        self.note = "text"
        self.names = {"a", "b"}


class Runs:
    def __init__(self, call: Any, *args: Any) -> None:
        self._reduced = (call, args)

    def __reduce__(self) -> Any:
        return self._reduced


def _write(path: Path, program: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        for name, raw in (records or {}).items():
            archive.writestr(f"archive/{name}", raw)
    return path


def test_a_pickled_module_gives_its_tensors(tmp_path: Path) -> None:
    module = Attachment()
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "net": module}, tmp_path / "m.pt")
    read = read_pickled_tensors(tmp_path / "m.pt")
    assert read.pop("string_to_token.*").item() == 265
    expected = {f"net.{k}": v for k, v in module.state_dict().items()}
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool])
def test_every_dtype_and_layout(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.randint(0, 2, (6, 8)).to(dtype)
    tensors = {
        "plain": base,
        "view": base[1:4, ::2],
        "turned": base.T,
        "none": base[:0],
        "a": [base],
    }
    torch.save(tensors, tmp_path / "t.pt")
    read = read_pickled_tensors(tmp_path / "t.pt")
    for name, tensor in {**tensors, "a.0": base}.items():
        if name != "a":
            assert torch.equal(read[name], tensor)  # type: ignore[arg-type]


def test_release_file_of_msi_weights(tmp_path: Path) -> None:
    msi = MSI(12, 16, 16, 8)
    torch.save({"string_to_token": {}, "attention": msi}, tmp_path / "embeddings.pt")
    torch.save({f"module.{k}": v for k, v in msi.state_dict().items()}, tmp_path / "plain.pt")
    for name in ("embeddings.pt", "plain.pt"):
        read = read_msi(tmp_path / name)
        assert set(read) == set(msi.state_dict())
        assert all(torch.equal(read[k], v) for k, v in msi.state_dict().items())
    torch.save({"conv": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(OptionError, match=r"0 tensors named 't_embed1.weight'.*conv"):
        read_msi(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("call", "args"),
    [
        (os.system, ("touch ran",)),
        (eval, ("open('ran', 'w')",)),
        (io.open, ("ran", "w")),
        (torch.load, ("ran",)),
        (nn.Linear, (10**6, 10**6)),
        (Attachment, ()),
        (OptionError, ("called",)),
    ],
)
def test_nothing_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any, args: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in (1, 2, 4):
        program = pickle.dumps({"a": Runs(call, *args)}, protocol)
        with pytest.raises(OptionError, match=call.__name__):
            read_pickled_tensors(_write(tmp_path / "hostile.pt", program))
    assert os.listdir(tmp_path) == ["hostile.pt"]


def _tensor_program(offset: int, size: Any, stride: Any, count: int, dtype: str = "Float") -> bytes:
    """What torch.save writes for one tensor, with any numbers."""

    class Tensor:
        def __reduce__(self) -> Any:
            arguments = (pid, offset, size, stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    pid = object()
    stream = io.BytesIO()
    kind = getattr(torch, f"{dtype}Storage")

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", kind, "0", "cpu", count) if obj is pid else None

    Pickler(stream, 2).dump({"t": Tensor()})
    return stream.getvalue()


def test_the_forged_program_is_read_when_it_is_sound(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.pt", _tensor_program(1, (2, 2), (2, 1), 8), {"data/0": b"\0" * 32})
    assert read_pickled_tensors(path)["t"].shape == (2, 2)


@pytest.mark.parametrize(
    ("offset", "size", "stride", "count", "problem"),
    [
        (0, (3, 3), (3, 1), 8, "beyond its storage"),
        (7, (2,), (1,), 8, "beyond its storage"),
        (0, (2,), (10**15,), 8, "beyond its storage"),
        (0, (10**12,), (0,), 8, "repeats its storage"),
        (-1, (2,), (1,), 8, "malformed"),
        (0, (-2,), (1,), 8, "malformed"),
        (0, (2,), (1, 1), 8, "malformed"),
        (0, "ab", (1, 1), 8, "malformed"),
        (0, (2,), (1,), 9, "bytes"),
        (0, (2,), (1,), 10**15, "bytes"),
    ],
)
def test_tensors_stay_inside_their_storage(
    tmp_path: Path, offset: int, size: Any, stride: Any, count: int, problem: str
) -> None:
    program = _tensor_program(offset, size, stride, count)
    with pytest.raises(OptionError, match=problem):
        read_pickled_tensors(_write(tmp_path / "t.pt", program, {"data/0": b"\0" * 32}))


def test_a_compressed_record_is_refused_before_it_is_read(tmp_path: Path) -> None:
    program = _tensor_program(0, (1 << 24,), (1,), 1 << 24)
    path = _write(tmp_path / "t.pt", program)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * (4 << 24))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(OptionError, match="compressed"):
        read_pickled_tensors(path)


def test_endless_nesting_and_sharing_end(tmp_path: Path) -> None:
    shared: list[Any] = [torch.zeros(1)]
    for _ in range(40):
        shared = [shared, shared]
    loop: list[Any] = []
    loop.append(loop)
    for value in (shared, loop):
        stream = io.BytesIO()
        torch.save(value, stream)
        (tmp_path / "deep.pt").write_bytes(stream.getvalue())
        with pytest.raises(OptionError, match="nests deeper"):
            read_pickled_tensors(tmp_path / "deep.pt")


def test_other_files_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(OptionError, match="not a zip-based PyTorch file"):
        read_pickled_tensors(tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "empty.pt", "w") as archive:
        archive.writestr("a", b"")
    with pytest.raises(OptionError, match=r"data\.pkl"):
        read_pickled_tensors(tmp_path / "empty.pt")
    big = _write(tmp_path / "big.pt", pickle.dumps({}))
    big.write_bytes(big.read_bytes().replace(b"little", b"bigone"))
    with pytest.raises(OptionError):
        read_pickled_tensors(big)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_give_the_documented_error(tmp_path: Path, data: st.DataObject) -> None:
    stream = io.BytesIO()
    torch.save({"net": nn.Linear(2, 2), "x": torch.arange(3)}, stream)
    raw = bytearray(stream.getvalue())
    with zipfile.ZipFile(io.BytesIO(bytes(raw))) as archive:
        program = bytearray(archive.read("archive/data.pkl"))
        records = {n.removeprefix("archive/"): archive.read(n) for n in archive.namelist()}
    if data.draw(st.booleans(), label="inside the pickle"):
        for _ in range(data.draw(st.integers(1, 3))):
            program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
        records = {k: v for k, v in records.items() if k.startswith("data/")}
        _write(tmp_path / "f.pt", bytes(program), records)
    else:
        cut = data.draw(st.integers(0, len(raw)))
        (tmp_path / "f.pt").write_bytes(bytes(raw[:cut]))
    try:
        read = read_pickled_tensors(tmp_path / "f.pt")
    except OptionError:
        return
    assert all(isinstance(t, torch.Tensor) and t.numel() <= 16 for t in read.values())
