"""Golden data: a backend that computes something else is found out, whatever is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import diffveil
from diffveil.bundle import MANIFEST_FILE, Bundle
from diffveil.engines import Array, Availability, Engine, ONNXRuntimeCPU
from diffveil.errors import (
    BackendUnavailableError,
    BundleCorruptError,
    BundleError,
    EngineError,
)
from diffveil.golden import (
    GOLDEN_FILE,
    GoldenCheck,
    check_backend,
    load_golden,
    require_golden,
)
from diffveil.parity import describe
from diffveil.programs import PROGRAMS, ProgramSpec


class _Wrong:
    """A backend whose results are spoiled on the way out."""

    name = "wrong"

    def __init__(self, spoil: Any) -> None:
        self.inner, self.spoil = ONNXRuntimeCPU(threads=1), spoil

    def available(self) -> Availability:
        return Availability(True, "always")

    def load(self, bundle: Bundle, program: str) -> Engine:
        return _WrongEngine(self.inner.load(bundle, program), self.spoil)


class _WrongEngine:
    def __init__(self, inner: Engine, spoil: Any) -> None:
        self.inner, self.spoil = inner, spoil

    @property
    def program(self) -> ProgramSpec:
        return self.inner.program

    def run(self, **inputs: Array) -> dict[str, Array]:
        return {
            name: self.spoil(self.program.name, name, value)
            for name, value in self.inner.run(**inputs).items()
        }

    def close(self) -> None:
        self.inner.close()


def test_the_bundle_computes_what_pytorch_computed(tiny_bundle: Bundle) -> None:
    seen: list[str] = []
    rows = check_backend(tiny_bundle, ONNXRuntimeCPU(threads=1), progress=seen.append)
    assert seen == list(tiny_bundle.manifest.programs)
    assert {(r.program, r.output) for r in rows} == {
        (spec.name, t.name) for spec in PROGRAMS.values() for t in spec.outputs
    }
    assert all(rows)
    assert any(r.max_abs > 0 for r in rows)  # two different computations, not one with itself
    require_golden(tiny_bundle, ONNXRuntimeCPU(threads=1))


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("scaled", lambda value: value * np.float32(1.001)),
        ("NaN", lambda value: np.where(value == value.max(), np.float32(np.nan), value)),
        ("constant", lambda value: np.full_like(value, 0.5)),
        ("negated", lambda value: -value),
        ("half", lambda value: value.astype(np.float16)),
        ("shifted", lambda value: np.roll(value, 1, -1)),
        ("cut", lambda value: value[..., :-1]),
    ],
)
def test_wrong_results_are_refused(what: str, spoil: Any, tiny_bundle: Bundle) -> None:
    backend = _Wrong(lambda program, name, v: spoil(v) if program == "denoise" else v)
    rows = check_backend(tiny_bundle, backend, programs=["denoise", "recognize"])
    assert [(r.program, bool(r)) for r in rows] == [("denoise", False), ("recognize", True)]
    with pytest.raises(EngineError, match=r"'wrong' computes something else: denoise\.epsilon"):
        require_golden(tiny_bundle, backend)
    with pytest.raises(EngineError, match=r"denoise\.epsilon"):
        diffveil.Protector.load(tiny_bundle, backend=backend, verify=True)
    diffveil.Protector.load(tiny_bundle, backend=backend).close()  # only where it is asked for


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle_path, tmp_path / "copy"))


def _restate(folder: Path) -> Bundle:
    """Make the manifest agree with the golden file, as somebody might who writes their own."""
    from diffveil_export.bundle_writer import digest

    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"][GOLDEN_FILE] = digest(folder / GOLDEN_FILE)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return Bundle.load(folder)


def test_bundles_without_golden_data_load_and_say_so(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    del manifest["files"][GOLDEN_FILE]
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest))
    (copy / GOLDEN_FILE).unlink()
    bundle = Bundle.load(copy)
    diffveil.Protector.load(bundle).close()
    with pytest.raises(BundleError, match="carries no golden"):
        check_backend(bundle, ONNXRuntimeCPU())


def test_malformed_golden_data_is_named_together(copy: Path) -> None:
    tensors = load_file(copy / GOLDEN_FILE)
    del tensors["outputs.encode.latent"]
    tensors["inputs.timestep"] = tensors["inputs.timestep"].astype(np.int32)
    tensors["outputs.guide.energy"] = tensors["outputs.guide.energy"][:, None]
    tensors["inputs.repel"] = tensors["inputs.repel"][:1]
    save_file(tensors, copy / GOLDEN_FILE)
    with pytest.raises(BundleError) as caught:
        load_golden(_restate(copy))
    message = str(caught.value)
    assert "outputs.encode.latent: missing" in message
    assert "inputs.timestep: received int32 [2], expected int64 [B]" in message
    assert "outputs.guide.energy: received float32 [2, 1], expected float32 [B]" in message
    assert "inputs.repel: received 1 rows, expected at least 2" in message


def test_files_that_are_no_safetensors(copy: Path) -> None:
    (copy / GOLDEN_FILE).write_bytes(b"\xff" * 64)
    with pytest.raises(BundleError, match="not a safetensors file"):
        load_golden(_restate(copy))


def test_flipped_bits_are_found(copy: Path) -> None:
    raw = bytearray((copy / GOLDEN_FILE).read_bytes())
    raw[-5] ^= 1
    (copy / GOLDEN_FILE).write_bytes(raw)
    with pytest.raises(BundleCorruptError, match="received SHA-256"):
        load_golden(Bundle.load(copy))


def test_size_is_checked_before_reading(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffveil.golden._MAX_GOLDEN_BYTES", 100)
    with pytest.raises(BundleError, match="larger than 100 bytes"):
        load_golden(Bundle.load(copy))


class _Sized(_Wrong):
    """A backend whose engines take some batches only."""

    name = "sized"

    def __init__(self, least: int, most: int, spoil: Any = lambda program, name, value: value):
        super().__init__(spoil)
        self.batches = least, most
        self.rows: list[tuple[str, int]] = []

    def load(self, bundle: Bundle, program: str) -> Engine:
        return _SizedEngine(self, super().load(bundle, program))


class _SizedEngine:
    def __init__(self, backend: _Sized, inner: Engine) -> None:
        self._backend, self._inner = backend, inner
        self.program, self.batches = inner.program, backend.batches

    def run(self, **inputs: Array) -> dict[str, Array]:
        rows = len(next(iter(inputs.values())))
        assert self.batches[0] <= rows <= self.batches[1]
        self._backend.rows.append((self.program.name, rows))
        return self._inner.run(**inputs)

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("batches", [(1, 1), (3, 4), (4, 8), (1, 2)])
def test_engines_of_any_batch_are_judged(batches: tuple[int, int], tiny_bundle: Bundle) -> None:
    backend = _Sized(*batches)
    rows = check_backend(tiny_bundle, backend)
    assert all(rows), describe(rows)
    golden = load_golden(tiny_bundle)
    assert golden["inputs.sibling"][0, 1] != 0  # so its two rows cannot be torn apart unnoticed
    counts = {size for _, size in backend.rows}
    assert counts <= {1, 2} if batches[0] == 1 else counts == {batches[0]}


@pytest.mark.parametrize("batches", [(1, 1), (4, 8)])
@pytest.mark.parametrize("output", ["gradient", "embedding", "epsilon"])
def test_engines_of_any_batch_are_found_out(
    batches: tuple[int, int], output: str, tiny_bundle: Bundle
) -> None:
    """Wrong in the last golden row alone: every row is looked at."""
    calls: list[int] = []

    def spoil(program: str, name: str, value: Any) -> Any:
        if name != output:
            return value
        calls.append(1)
        last = 0 if len(value) == 1 else 1
        if len(value) == 1 and len(calls) == 1:
            return value
        value = value.copy()
        value[last] += 0.5
        return value

    program = "denoise" if output == "epsilon" else "guide"
    rows = check_backend(tiny_bundle, _Sized(*batches, spoil), programs=[program])
    assert [row.output for row in rows if not row] == [output]


def test_torn_rows_need_a_reference(tiny_bundle: Bundle) -> None:
    class Missing(ONNXRuntimeCPU):
        def load(self, bundle: Bundle, program: str) -> Engine:
            raise BackendUnavailableError("needs onnxruntime: pip install")

    engine = _Sized(1, 1).load(tiny_bundle, "guide")
    with pytest.raises(EngineError, match="nothing else to hold it against: needs onnxruntime"):
        GoldenCheck(tiny_bundle, Missing).compare(engine)
