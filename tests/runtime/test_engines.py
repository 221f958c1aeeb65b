"""Engines: what they check, what they say, and how they are shared."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import pytest

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs, select_backend
from diffveil.errors import BackendUnavailableError, BundleError, EngineError, OptionError
from diffveil.programs import PROGRAMS, check_inputs


@pytest.fixture
def programs(tiny_bundle: Bundle) -> Programs:
    return Programs(tiny_bundle, ONNXRuntimeCPU(threads=1))


@pytest.fixture
def image(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)


def test_calls_return_arrays_of_the_callers_own(programs: Programs, image: np.ndarray) -> None:
    first = programs.encode(image=image)
    assert first.shape == (2, 8, 4, 4)
    assert first.dtype == np.float32
    kept = first.copy()
    programs.encode(image=-image)
    np.testing.assert_array_equal(first, kept)
    first[:] = 0  # writable
    np.testing.assert_array_equal(programs.encode(image=image), kept)


def test_non_contiguous_inputs_are_read_rightly(programs: Programs, image: np.ndarray) -> None:
    flipped = image[:, :, ::-1]
    expected = programs.encode(image=np.ascontiguousarray(flipped))
    np.testing.assert_array_equal(programs.encode(image=flipped), expected)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, ["image: missing"]),
        ({"image": np.zeros((1, 3, 32, 32))}, ["image: received float64, expected float32"]),
        (
            {"image": np.zeros((1, 3, 32, 31), np.float32)},
            ["image: received [1, 3, 32, 31], expected [B=1, 3, 32, 32]"],
        ),
        ({"image": np.zeros((3, 32, 32), np.float32)}, ["received [3, 32, 32]"]),
        ({"image": np.zeros((0, 3, 32, 32), np.float32)}, ["empty batch"]),
        ({"image": [[1.0]]}, ["received list"]),
        (
            {"image": np.zeros((1, 3, 32, 32), np.float32), "photo": np.zeros(1)},
            ["photo: not an input"],
        ),
        ({"photo": np.zeros(1)}, ["photo: not an input", "image: missing"]),
    ],
)
def test_wrong_inputs_are_named(
    tiny_bundle: Bundle, inputs: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(EngineError) as caught:
        check_inputs(PROGRAMS["encode"], inputs, tiny_bundle.dimensions)
    assert "'encode'" in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_batches_must_agree(tiny_bundle: Bundle) -> None:
    inputs = {
        "latent": np.zeros((2, 8, 4, 4), np.float32),
        "timestep": np.zeros(3, np.int64),
        "conditioning": np.zeros((2, 5, 24), np.float32),
    }
    with pytest.raises(EngineError, match=r"timestep: received \[3\], expected \[B=2\]"):
        check_inputs(PROGRAMS["denoise"], inputs, tiny_bundle.dimensions)
    inputs["timestep"] = np.zeros(2, np.int64)
    assert check_inputs(PROGRAMS["denoise"], inputs, tiny_bundle.dimensions) == 2


def test_sibling_is_square(tiny_bundle: Bundle) -> None:
    inputs = {
        "x0": np.zeros((2, 8, 4, 4), np.float32),
        "anchor": np.zeros((2, 20), np.float32),
        "repel": np.zeros(2, np.float32),
        "attract": np.zeros(2, np.float32),
        "sibling": np.zeros((2, 3), np.float32),
    }
    with pytest.raises(EngineError, match="sibling"):
        check_inputs(PROGRAMS["guide"], inputs, tiny_bundle.dimensions)


def test_programs_load_once_under_threads(
    tiny_bundle: Bundle, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    original = ONNXRuntimeCPU.load

    def counting(self: ONNXRuntimeCPU, bundle: Bundle, program: str) -> Any:
        loads.append(program)
        return original(self, bundle, program)

    monkeypatch.setattr(ONNXRuntimeCPU, "load", counting)
    programs = Programs(tiny_bundle, ONNXRuntimeCPU(threads=1))
    assert loads == []
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(programs.encode(image=image)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["encode"]
    assert len(results) == 4
    assert all(np.array_equal(r, results[0]) for r in results)


def test_closed_programs_refuse(tiny_bundle: Bundle, image: np.ndarray) -> None:
    with Programs(tiny_bundle, ONNXRuntimeCPU(threads=1)) as programs:
        engine = programs.engine("encode")
    with pytest.raises(EngineError, match="closed"):
        programs.encode(image=image)
    with pytest.raises(EngineError, match="closed"):
        engine.run(image=image)


def test_unknown_program(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="no program 'shell'"):
        ONNXRuntimeCPU().load(tiny_bundle, "shell")


def test_a_graph_that_is_no_such_program_is_refused(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = tiny_bundle.program_path("decode")
    monkeypatch.setattr(Bundle, "program_path", lambda self, name: decode)
    with pytest.raises(EngineError, match="program 'encode': received a graph"):
        ONNXRuntimeCPU(threads=1).load(tiny_bundle, "encode")


def test_what_onnx_runtime_refuses_is_an_engine_error(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tiny_bundle.path / "bundle.json"
    monkeypatch.setattr(Bundle, "program_path", lambda self, name: broken)
    with pytest.raises(EngineError, match="'encode' cannot be loaded"):
        ONNXRuntimeCPU(threads=1).load(tiny_bundle, "encode")


def test_selection_explains_itself() -> None:
    selection = select_backend()
    assert selection.require().name == "cpu"
    (reason,) = [r for r in selection.reasons if r.chosen]
    assert reason.ok
    assert "onnxruntime" in reason.why
    with pytest.raises(OptionError, match=r"'abacus', expected one of auto, .*cpu"):
        select_backend("abacus")
    with pytest.raises(OptionError, match="threads"):
        select_backend(threads=0)


def test_without_onnx_runtime_the_way_out_is_named(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    selection = select_backend()
    assert selection.backend is None
    with pytest.raises(BackendUnavailableError, match=r"pip install 'diffveil\[cpu\]'"):
        selection.require()
    with pytest.raises(BackendUnavailableError, match=r"pip install 'diffveil\[cpu\]'"):
        ONNXRuntimeCPU().load(tiny_bundle, "encode")
