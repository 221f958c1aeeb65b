"""Widening bfloat16: the copy that a CPU runs rounds exactly where the original does."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from diffveil_export.passes.widen_bfloat16 import WidenBFloat16

BF16, F32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def _value(name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _graph(weight: np.ndarray) -> ir.Model:
    """y = float32(bf16(bf16(x) · w) + bf16(x)), typed like an exported program."""
    x, half = _value("x", F32, [3, 4]), _value("half", BF16, [3, 4])
    w = _value("w", BF16, [4, 4])
    w.const_value = ir.tensor(weight.astype(ml_dtypes.bfloat16), name="w")
    product, total = _value("product", BF16, [3, 4]), _value("total", BF16, [3, 4])
    y = _value("y", F32, [3, 4])
    nodes = [
        ir.Node("", "Cast", [x], [ir.AttrInt64("to", int(BF16))], outputs=[half]),
        ir.Node("", "MatMul", [half, w], outputs=[product]),
        ir.Node("", "Add", [product, half], outputs=[total]),
        ir.Node("", "Cast", [total], [ir.AttrInt64("to", int(F32))], outputs=[y]),
    ]
    graph = ir.Graph([x], [y], nodes=nodes, initializers=[w], opset_imports={"": 22})
    return ir.Model(graph, ir_version=10)


def test_every_result_is_rounded(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((4, 4)).astype(np.float32)
    model = _graph(weight)
    assert WidenBFloat16()(model).modified
    assert {n.outputs[0].dtype for n in model.graph if n.op_type in ("MatMul", "Add")} == {F32}
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = rng.standard_normal((3, 4)).astype(np.float32)
    (actual,) = session.run(["y"], {"x": x})

    def rounded(array: np.ndarray) -> np.ndarray:
        return array.astype(ml_dtypes.bfloat16).astype(np.float32)

    product = rounded(rounded(x) @ rounded(weight))
    np.testing.assert_array_equal(actual, rounded(product + rounded(x)))
    assert not np.array_equal(actual, rounded(rounded(x) @ rounded(weight) + rounded(x)))


def test_float32_graphs_are_left_alone(rng: np.random.Generator) -> None:
    x, y = _value("x", F32, [2]), _value("y", F32, [2])
    graph = ir.Graph([x], [y], nodes=[ir.Node("", "Relu", [x], outputs=[y])])
    model = ir.Model(graph, ir_version=10)
    assert not WidenBFloat16()(model).modified
    assert [n.op_type for n in model.graph] == ["Relu"]


def test_subgraphs_are_refused() -> None:
    x, y = _value("x", BF16, [2]), _value("y", BF16, [2])
    inner = ir.Graph([], [], nodes=[])
    node = ir.Node("", "Loop", [x], [ir.AttrGraph("body", inner)], outputs=[y])
    model = ir.Model(ir.Graph([x], [y], nodes=[node]), ir_version=10)
    with pytest.raises(ValueError, match="subgraph"):
        WidenBFloat16()(model)
