"""Rounding of weights, lossless storage of what was rounded, and sharing."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.models.low_rank import LowRankLinear
from diffveil_export.storage import (
    DataFile,
    WeightStorage,
    _dequantize,
    quantize,
    round_weights,
    shrink_initializers,
)


def _model(weight: np.ndarray, op: str = "MatMul") -> ir.Model:
    """x [B, n] times a weight, in one node."""
    x = ir.Value(
        name="x", shape=ir.Shape(["B", weight.shape[0]]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    w = ir.Value(
        name="w",
        shape=ir.Shape(weight.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(weight, name="w"),
    )
    node = ir.Node("", op, [x, w])
    node.outputs[0].name = "y"
    node.outputs[0].dtype = ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["B", weight.shape[1]])
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 21}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def _run(path: Path, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-30, 30),
    axis=st.integers(0, 1),
    zero_channel=st.booleans(),
)
def test_quantizing_again_changes_nothing(
    seed: int, exponent: int, axis: int, zero_channel: bool
) -> None:
    weight = np.random.default_rng(seed).standard_normal((6, 9)).astype(np.float32)
    weight *= np.float32(2.0) ** exponent
    if zero_channel:
        weight[0] = 0
        weight[:, 0] = 0
    integers, scale = quantize(weight, axis)
    rounded = _dequantize(integers, scale, axis)
    again, same_scale = quantize(rounded, axis)
    used = np.abs(integers).max(axis=1 - axis) > 0
    np.testing.assert_array_equal(again, integers)
    np.testing.assert_array_equal(same_scale[used], scale[used])
    shape = (-1, 1) if axis == 0 else (1, -1)
    # Half a step, and one unit in the last place of the product.
    assert (np.abs(rounded - weight) <= 0.5000001 * scale.reshape(shape)).all()


@pytest.mark.parametrize("storage", ["int4", "int8", "float16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_storage_is_lossless_after_rounding(
    storage: WeightStorage, transposed: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    layer = nn.Linear(256, 272, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(rng.standard_normal((272, 256)).astype(np.float32)))
    round_weights(layer, storage)
    weight = layer.weight.detach().numpy()
    weight = np.ascontiguousarray(weight.T) if transposed else weight
    model = _model(weight)
    assert shrink_initializers(model, storage) == 1
    restoring = {"int4": ["Cast", "DequantizeLinear"], "int8": ["DequantizeLinear"]}
    nodes = [n.op_type for n in model.graph]
    assert nodes == [*restoring.get(storage, ["Cast"]), "MatMul"]
    small = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    assert small <= weight.size * {"int4": 0.5625, "int8": 1.02, "float16": 2}[storage]
    path = tmp_path / "m.onnx"
    ir.save(model, path)
    # A unit matrix reads the weight back.
    identity = np.eye(weight.shape[0], dtype=np.float32)
    np.testing.assert_array_equal(_run(path, identity), weight)


def test_unrounded_weights_are_left_alone(rng: np.random.Generator) -> None:
    model = _model(rng.standard_normal((40, 48)).astype(np.float32))
    assert shrink_initializers(model, "int8") == 0
    assert [n.op_type for n in model.graph] == ["MatMul"]


def test_equal_weights_are_written_once(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((40, 48)).astype(np.float32)
    other = rng.standard_normal((40, 48)).astype(np.float32)
    data = DataFile(tmp_path / "w.bin")
    for name, matrix in (("a", weight), ("b", weight), ("c", other)):
        model = _model(matrix)
        data.absorb(model)
        ir.save(model, tmp_path / f"{name}.onnx")
    data.close()
    assert (tmp_path / "w.bin").stat().st_size == 2 * weight.nbytes
    identity = np.eye(40, dtype=np.float32)
    np.testing.assert_array_equal(_run(tmp_path / "b.onnx", identity), weight)
    np.testing.assert_array_equal(_run(tmp_path / "c.onnx", identity), other)


def test_four_bits_are_for_large_weights_but_not_for_changes(rng: np.random.Generator) -> None:
    """Others are rounded as under int8."""
    change = LowRankLinear(nn.Linear(512, 256), 8)
    layers = nn.ModuleDict(
        {"large": nn.Conv2d(64, 128, 3), "odd": nn.Conv2d(72, 128, 3), "change": change}
    )
    with torch.no_grad():
        change.up.weight.normal_()
        layers["change"].down = nn.Linear(512, 256)  # a change as large as others' weights
    coarse, fine = copy.deepcopy(layers), copy.deepcopy(layers)
    round_weights(coarse, "int4")
    round_weights(fine, "int8")
    moved = {
        name
        for (name, a), b in zip(coarse.named_parameters(), fine.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert moved == {"large.weight", "change.base.weight"}
    before = copy.deepcopy(coarse)
    round_weights(coarse, "int4")
    for a, b in zip(coarse.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_small_tensors_and_float32_storage_stay(rng: np.random.Generator) -> None:
    norm = nn.Linear(8, 8)
    before = norm.weight.detach().clone()
    round_weights(norm, "int8")
    assert torch.equal(norm.weight, before)
    large = nn.Linear(64, 64)
    before = large.weight.detach().clone()
    round_weights(large, "float32")
    assert torch.equal(large.weight, before)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e6])
def test_weights_beyond_four_bits_are_named(value: float) -> None:
    layer = nn.Sequential(nn.Linear(256, 256))
    with torch.no_grad():
        layer[0].weight[3, 5] = value
    with pytest.raises(OptionError, match=r"0\.weight"):
        round_weights(layer, "int4")


@pytest.mark.parametrize("storage", ["int8", "float16"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e6])
def test_weights_that_cannot_be_stored_are_named(storage: WeightStorage, value: float) -> None:
    table = nn.Sequential(nn.Embedding(64, 64))
    with torch.no_grad():
        table[0].weight[3, 5] = value
    with pytest.raises(OptionError, match=r"0\.weight"):
        round_weights(table, storage)


def test_engines_fold_the_restoring_nodes(tmp_path: Path, tiny_bundle_path: Path) -> None:
    """With the runtime's options nothing is restored during a call."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        str(tiny_bundle_path / "guide.onnx"), options, providers=["CPUExecutionProvider"]
    )
    optimized = ir.load(tmp_path / "optimized.onnx")
    left = {node.op_type for node in optimized.graph}
    assert "DequantizeLinear" not in left
    # What rearranges kernels for the backward pass folds too: it has no input that varies.
    constant = set(optimized.graph.initializers)
    rearranging = [
        node.op_type
        for node in optimized.graph
        if all(v is None or v.name in constant for v in node.inputs) and node.inputs
    ]
    assert rearranging == []
