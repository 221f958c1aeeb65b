"""Folding weights: one test a rule, with graphs made here, and ONNX Runtime as the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from diffveil_export.passes.fold_weights import FoldWeights


def constant(name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def graph_of(
    nodes: list[ir.Node],
    constants: list[ir.Value],
    width: int,
    output: ir.Value | None = None,
    first: tuple[int, int] = (2, 3),
) -> ir.Model:
    """y = x + w, with x [2, 3, width] and w what the last of the nodes gives."""
    weight, shape = nodes[-1].outputs[0], ir.Shape([*first, width])
    x = ir.Value(name="x", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    add = ir.Node("", "Add", [x, weight], outputs=[ir.Value(name="y")])
    y = add.outputs[0]
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), shape
    outputs = [y] if output is None else [y, output]
    graph = ir.Graph(
        [x], outputs, nodes=[*nodes, add], initializers=constants, opset_imports={"": 21}
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: Any) -> Any:
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
@pytest.mark.parametrize("zero_point", [False, True])
def test_dequantize_is_computed_exactly(
    rng: np.random.Generator, axis: int | None, zero_point: bool
) -> None:
    shape = (2, 3, 5)
    count = () if axis is None else (shape[axis],)
    inputs = [
        constant("q", rng.integers(-128, 128, shape, dtype=np.int8)),
        constant("s", rng.uniform(0.01, 1, count).astype(np.float32)),
    ]
    if zero_point:
        inputs.append(constant("z", rng.integers(-9, 9, count, dtype=np.int8)))
    attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
    node = ir.Node("", "DequantizeLinear", inputs, attributes, outputs=[ir.Value(name="w")])
    model = graph_of([node], inputs, 5)
    x = rng.standard_normal(shape).astype(np.float32)
    expected = run(model, x)
    assert FoldWeights()(model).modified
    assert [n.op_type for n in model.graph] == ["Add"]
    assert list(model.graph.initializers) == ["w.folded"]
    np.testing.assert_array_equal(run(model, x), expected)
    assert not FoldWeights()(model).modified


def test_chains_are_folded_and_rounded_as_the_runtime_rounds(rng: np.random.Generator) -> None:
    stored = constant("h", rng.standard_normal((2, 3, 4)).astype(np.float32) * 1e4)
    half = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", 10)], outputs=[ir.Value(name="half")])
    single = ir.Node(
        "", "Cast", [half.outputs[0]], [ir.AttrInt64("to", 1)], outputs=[ir.Value(name="w")]
    )
    model = graph_of([half, single], [stored], 4)
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    expected = run(model, x)
    FoldWeights()(model)
    assert [n.op_type for n in model.graph] == ["Add"]
    np.testing.assert_array_equal(run(model, x), expected)


def test_half_scales_give_half_weights(rng: np.random.Generator) -> None:
    inputs = [
        constant("q", rng.integers(-128, 128, (3, 4), dtype=np.int8)),
        constant("s", rng.uniform(0.01, 1, 3).astype(np.float16)),
    ]
    node = ir.Node(
        "", "DequantizeLinear", inputs, [ir.AttrInt64("axis", 0)], outputs=[ir.Value(name="w")]
    )
    model = graph_of([node], inputs, 4)
    FoldWeights()(model)
    folded = model.graph.initializers["w.folded"].const_value
    assert folded is not None
    assert folded.dtype == ir.DataType.FLOAT16
    exact = inputs[0].const_value.numpy().astype(np.float64) * inputs[1].const_value.numpy().astype(  # type: ignore[union-attr]
        np.float64
    ).reshape(3, 1)
    np.testing.assert_array_equal(folded.numpy(), exact.astype(np.float16))


def test_shared_weights_stay_for_whoever_else_reads_them(rng: np.random.Generator) -> None:
    stored = constant("h", rng.standard_normal((2, 3, 4)).astype(np.float16))
    cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", 1)], outputs=[ir.Value(name="w")])
    other = ir.Node("", "Neg", [stored], outputs=[ir.Value(name="n")])
    n = other.outputs[0]
    n.type, n.shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape([2, 3, 4])
    model = graph_of([other, cast], [stored], 4, output=n)
    FoldWeights()(model)
    assert set(model.graph.initializers) == {"h", "w.folded"}
    assert [node.op_type for node in model.graph] == ["Neg", "Add"]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("zero_point", [False, True])
def test_blocks_are_computed_exactly(rng: np.random.Generator, axis: int, zero_point: bool) -> None:
    shape, fewer = [4, 6, 8], [4, 6, 8]
    fewer[axis] //= 2
    int4 = ir.DataType.INT4.numpy()
    inputs = [
        constant("q", rng.integers(-8, 8, shape).astype(int4)),
        constant("s", rng.uniform(0.01, 1, fewer).astype(np.float32)),
    ]
    if zero_point:
        inputs.append(constant("z", rng.integers(-2, 3, fewer).astype(int4)))
    attributes = [ir.AttrInt64("axis", axis), ir.AttrInt64("block_size", 2)]
    node = ir.Node("", "DequantizeLinear", inputs, attributes, outputs=[ir.Value(name="w")])
    model = graph_of([node], inputs, 8, first=(4, 6))
    x = rng.standard_normal(shape).astype(np.float32)
    expected = run(model, x)
    assert FoldWeights()(model).modified
    assert list(model.graph.initializers) == ["w.folded"]
    np.testing.assert_array_equal(run(model, x), expected)


def test_blocks_alone_are_folded_where_others_are_to_stay(rng: np.random.Generator) -> None:
    integers = constant("q", rng.integers(-8, 8, (2, 3, 4)).astype(ir.DataType.INT4.numpy()))
    halves = constant("h", rng.uniform(0.01, 1, (2, 3, 2)).astype(np.float16))
    cast = ir.Node("", "Cast", [halves], [ir.AttrInt64("to", 1)], outputs=[ir.Value(name="s")])
    attributes = [ir.AttrInt64("axis", 2), ir.AttrInt64("block_size", 2)]
    inputs = [integers, cast.outputs[0]]
    blocks = ir.Node("", "DequantizeLinear", inputs, attributes, outputs=[ir.Value(name="b")])
    plain = [
        constant("p", rng.integers(-128, 128, (2, 3, 4), dtype=np.int8)),
        constant("t", rng.uniform(0.01, 1, 3).astype(np.float32)),
    ]
    other = ir.Node(
        "", "DequantizeLinear", plain, [ir.AttrInt64("axis", 1)], outputs=[ir.Value(name="o")]
    )
    both = ir.Node("", "Add", [blocks.outputs[0], other.outputs[0]], outputs=[ir.Value(name="w")])
    model = graph_of([cast, blocks, other, both], [integers, halves, *plain], 4)
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    expected = run(model, x)
    assert FoldWeights(only_blocks=True)(model).modified
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "Add", "Add"]
    np.testing.assert_array_equal(run(model, x), expected)
    assert not FoldWeights(only_blocks=True)(model).modified


def test_integers_results_and_overridable_constants_stay() -> None:
    integers = constant("i", np.arange(24).reshape(2, 3, 4))
    cast = ir.Node("", "Cast", [integers], [ir.AttrInt64("to", 1)], outputs=[ir.Value(name="w")])
    assert not FoldWeights()(graph_of([cast], [integers], 4)).modified

    for leaves in (True, False):
        half = constant("h", np.ones((2, 3, 4), np.float16))
        cast = ir.Node("", "Cast", [half], [ir.AttrInt64("to", 1)], outputs=[ir.Value(name="w")])
        w = cast.outputs[0]
        w.type, w.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 3, 4])
        model = graph_of([cast], [half], 4, output=w if leaves else None)
        if not leaves:
            model.graph.inputs.append(half)
        assert not FoldWeights()(model).modified


def test_saving_computes_the_weights(rng: np.random.Generator, tmp_path: Path) -> None:
    half = constant("h", rng.standard_normal((2, 3, 400)).astype(np.float16))
    cast = ir.Node("", "Cast", [half], [ir.AttrInt64("to", 1)], outputs=[ir.Value(name="w")])
    model = graph_of([cast], [half], 400)
    stored = half.const_value
    assert stored is not None
    FoldWeights()(model)
    ir.save(model, tmp_path / "m.onnx", external_data="weights.bin")
    again = ir.load(tmp_path / "m.onnx").graph.initializers["w.folded"].const_value
    assert again is not None
    np.testing.assert_array_equal(again.numpy(), stored.numpy().astype(np.float32))
