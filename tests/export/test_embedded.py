"""The PyTorch networks rebuilt from a bundle are those that were exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU
from diffveil.errors import BundleError
from diffveil.golden import check_backend
from diffveil_export import storage
from diffveil_export.blocks import fit_blocks, read_blocks, restore_blocks
from diffveil_export.components import Components
from diffveil_export.exporter import export_bundle
from diffveil_export.models.embedded import SOURCE_FILE, _int4, _place_blocks, _read, load_embedded
from diffveil_export.step import fuse_step
from diffveil_export.storage import round_weights
from tiny_models import tiny_components, tiny_few_components


def test_every_weight_comes_back(tiny_bundle: Bundle) -> None:
    exported = tiny_components()
    for module in exported.modules().values():
        round_weights(module, "int8")
    rebuilt = load_embedded(tiny_bundle)
    for part, module in exported.modules().items():
        state = rebuilt.modules()[part].state_dict()
        assert state.keys() == module.state_dict().keys()
        for name, tensor in module.state_dict().items():
            assert torch.equal(state[name], tensor), f"{part}.{name}"


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Components, Bundle]:
    """A tiny model with a few-step change, its UNet in blocks of four bits, and its bundle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_LARGE", 2048)
        components = tiny_few_components()
        target = tmp_path_factory.mktemp("four-bits") / "bundle"
        return components, export_bundle(components, target, weights="int4").bundle


def test_weights_in_four_bits_come_back(four_bits: tuple[Components, Bundle]) -> None:
    exported, bundle = four_bits
    rebuilt = load_embedded(bundle)
    for part, module in exported.modules().items():
        state = rebuilt.modules()[part].state_dict()
        for name, tensor in module.state_dict().items():
            assert torch.equal(state[name], tensor), f"{part}.{name}"
    index, _ = _read(bundle)
    small = {name for name, place in index["places"].items() if place["kind"] == "int4"}
    assert small
    assert all(name.startswith("unet.") for name in small)


@pytest.mark.parametrize("transposed", [False, True])
def test_four_bits_are_found_as_they_lie_in_the_file(
    transposed: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    weight = rng.standard_normal((272, 256)).astype(np.float32)
    weight = restore_blocks(*fit_blocks(weight, 1), 1)
    blocks = read_blocks(weight, 1)
    assert blocks is not None
    store = storage.DataFile(tmp_path / "w.bin")
    arrays = [np.ascontiguousarray(b.T if transposed else b) for b in blocks]
    values = [
        ir.Value(name="i", const_value=ir.tensor(arrays[0].astype(ir.DataType.INT4.numpy()))),
        ir.Value(name="s", const_value=ir.tensor(arrays[1])),
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g")
    store.absorb(ir.Model(graph, ir_version=10))
    place = _place_blocks(weight, store)
    store.close()
    assert place is not None
    assert place["transposed"] == transposed
    shape = list(arrays[0].shape)
    found = _int4(np.fromfile(tmp_path / "w.bin", np.uint8), place, shape)
    np.testing.assert_array_equal(found.T if transposed else found, weight)
    assert _place_blocks(-weight, store) is None


def test_engines_restore_four_bits_once(
    four_bits: tuple[Components, Bundle], tmp_path: Path
) -> None:
    """With the runtime's options nothing is restored during a call."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    for program in ("denoise", "denoise_few"):
        stored = ir.load(four_bits[1].program_path(program))
        assert "INT4" in {v.const_value.dtype.name for v in stored.graph.initializers.values()}
        onnxruntime.InferenceSession(
            str(four_bits[1].program_path(program)), options, providers=["CPUExecutionProvider"]
        )
        optimized = ir.load(tmp_path / "optimized.onnx")
        assert "DequantizeLinear" not in {node.op_type for node in optimized.graph}


def test_a_step_with_weights_in_four_bits_is_fused(
    four_bits: tuple[Components, Bundle], tmp_path: Path
) -> None:
    fused = fuse_step(four_bits[1], tmp_path / "fused")
    assert fused.fingerprint == four_bits[1].fingerprint
    assert all(check_backend(fused, ONNXRuntimeCPU(threads=1), programs=["step"]))


def test_unconditional_is_the_bundles_own(tiny_bundle: Bundle) -> None:
    expected = torch.from_numpy(tiny_bundle.unconditional.copy())
    assert torch.equal(load_embedded(tiny_bundle).unconditional, expected)


def test_a_bundle_without_an_index_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    (copy / SOURCE_FILE).unlink()
    with pytest.raises(BundleError):
        load_embedded(Bundle.load(copy))
