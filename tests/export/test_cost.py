"""Counting operations and bytes, against counts by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from diffveil.bundle import Bundle
from diffveil_export.cost import program_cost

F16, F32 = ir.DataType.FLOAT16, ir.DataType.FLOAT


def _value(name: str, shape: list[int | str], dtype: ir.DataType = F32) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _weight(name: str, *shape: int) -> ir.Value:
    value = _value(name, list(shape))
    value.const_value = ir.tensor(np.zeros(shape, np.float32), name=name)
    return value


def _model(nodes: list[ir.Node], source: ir.Value, weights: list[ir.Value]) -> ir.Model:
    graph = ir.Graph([source], nodes[-1].outputs, nodes=nodes, initializers=weights)
    return ir.Model(graph, ir_version=10)


def test_convolution_and_elementwise() -> None:
    x, w = _value("x", ["B", 4, 5, 7]), _weight("w", 6, 2, 3, 3)
    y, z = _value("y", ["B", 6, 5, 7]), _value("z", ["B", 6, 5, 7])
    nodes = [
        ir.Node("", "Conv", [x, w], [ir.AttrInt64("group", 2)], outputs=[y]),
        ir.Node("", "Relu", [y], outputs=[z]),
    ]
    cost = program_cost(_model(nodes, x, [w]))
    assert cost.flops == 2 * (6 * 5 * 7) * (2 * 3 * 3) + 6 * 5 * 7
    assert cost.weight_bytes == 6 * 2 * 3 * 3 * 4
    assert cost.activation_bytes == 2 * (6 * 5 * 7) * 4


def test_transposed_convolution_counts_its_input() -> None:
    x, w, y = _value("x", ["B", 4, 5, 7]), _weight("w", 4, 3, 2, 2), _value("y", ["B", 3, 10, 14])
    cost = program_cost(_model([ir.Node("", "ConvTranspose", [x, w], outputs=[y])], x, [w]))
    assert cost.flops == 2 * (4 * 5 * 7) * (3 * 2 * 2)


@pytest.mark.parametrize("transposed", [0, 1])
def test_products_casts_and_views(transposed: int) -> None:
    rows: list[int | str] = [8, "B"] if transposed else ["B", 8]
    x, w, y = _value("x", rows), _weight("w", 8, 3), _value("y", ["B", 3])
    half, flat = _value("half", ["B", 3], F16), _value("flat", ["3*B"], F16)
    nodes = [
        ir.Node("", "Gemm", [x, w], [ir.AttrInt64("transA", transposed)], outputs=[y]),
        ir.Node("", "Cast", [y], [ir.AttrInt64("to", int(F16))], outputs=[half]),
        ir.Node("", "Reshape", [half], outputs=[flat]),
        ir.Node("", "Relu", [flat], outputs=[_value("z", ["3*B"], F16)]),
    ]
    cost = program_cost(_model(nodes, x, [w]))
    assert cost.flops == 2 * 3 * 8 + 3
    assert cost.activation_bytes == 3 * 4 + 3 * 2 + 3 * 2  # Gemm, Cast, Relu


def test_what_depends_on_weights_alone_costs_nothing() -> None:
    w, x = _weight("w", 3, 5), _value("x", ["B", 5])
    turned, y = _value("turned", [5, 3]), _value("y", ["B", 3])
    nodes = [
        ir.Node("", "Transpose", [w], outputs=[turned]),
        ir.Node("", "Relu", [turned], outputs=[_value("relu", [5, 3])]),
    ]
    nodes.append(ir.Node("", "MatMul", [x, nodes[1].outputs[0]], outputs=[y]))
    cost = program_cost(_model(nodes, x, [w]))
    assert cost.flops == 2 * 3 * 5
    assert cost.activation_bytes == 3 * 4


def test_exports_state_their_cost(tiny_bundle: Bundle) -> None:
    costs = {name: p.cost for name, p in tiny_bundle.manifest.programs.items()}
    decode, guide, recognize = costs["decode"], costs["guide"], costs["recognize"]
    assert decode is not None
    assert guide is not None
    assert recognize is not None
    # Forward through both, and a way back that costs no less.
    forward = decode.flops + recognize.flops
    assert 1.7 * forward < guide.flops < 3 * forward
