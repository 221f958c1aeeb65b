"""Operations and bytes of a program, counted on its graph with a batch of one.

Counted are the nodes that run at every call: what depends on constants alone is computed once,
when an engine loads the program.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import onnx_ir as ir

from diffveil._manifest import Cost

__all__ = ["program_cost"]

_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Shape"})
"""Operators that move nothing: engines give the same memory another shape."""

_COPIES = frozenset(
    {
        "Cast",
        "Concat",
        "ConstantOfShape",
        "Expand",
        "Gather",
        "Pad",
        "Range",
        "Resize",
        "Slice",
        "Split",
        "Tile",
        "Transpose",
        "DepthToSpace",
        "SpaceToDepth",
    }
)
"""Operators that move numbers and compute none."""


def program_cost(model: ir.Model) -> Cost:
    """Count one program.

    A convolution or matrix product counts two operations a multiply-add, any other operator one a
    number that it writes. Weights count in the type that is computed with.

    Args:
        model: The program, its values with shapes; sizes that are not numbers count as a batch of
            one. Weights are not yet packed (`shrink_initializers`).
    """
    constants = set(model.graph.initializers.values())
    flops = activations = 0
    weights = sum(v.const_value.nbytes for v in constants if v.const_value is not None)
    for node in model.graph:
        inputs = [i for i in node.inputs if i is not None]
        if node.op_type == "Constant" or (inputs and all(i in constants for i in inputs)):
            constants.update(node.outputs)
            continue
        if node.op_type in _VIEWS:
            continue
        written = [(_size(o), o.dtype) for o in node.outputs]
        activations += sum(
            math.ceil(size * dtype.itemsize) for size, dtype in written if dtype is not None
        )
        if node.op_type in _COPIES:
            continue
        count = _PRODUCTS.get(node.op_type)
        flops += count(node) if count else sum(size for size, _ in written)
    return Cost(flops=flops, weight_bytes=weights, activation_bytes=activations)


def _sizes(value: ir.Value | None) -> list[int]:
    """Sizes of a value's axes, with a batch of one."""
    if value is None or value.shape is None:
        return []
    return [d if isinstance(d, int) else _symbol(str(d)) for d in value.shape]


def _symbol(text: str) -> int:
    """Size of a symbolic axis, a product of the batch and numbers, where the batch is one."""
    return math.prod(int(n) for n in re.findall(r"(?<![\w.])\d+(?![\w.])", text))


def _size(value: ir.Value) -> int:
    return math.prod(_sizes(value))


def _convolution(node: ir.Node) -> int:
    _, per_group, *kernel = _sizes(node.inputs[1])
    return 2 * _size(node.outputs[0]) * per_group * math.prod(kernel)


def _transposed_convolution(node: ir.Node) -> int:
    source = node.inputs[0]
    assert source is not None
    _, per_group, *kernel = _sizes(node.inputs[1])
    return 2 * _size(source) * per_group * math.prod(kernel)


def _product(node: ir.Node) -> int:
    return 2 * _size(node.outputs[0]) * (_sizes(node.inputs[0]) or [1])[-1]


def _gemm(node: ir.Node) -> int:
    rows = _sizes(node.inputs[0])
    transposed = "transA" in node.attributes and node.attributes["transA"].as_int()
    return 2 * _size(node.outputs[0]) * (rows[0] if transposed else rows[-1])


_PRODUCTS: dict[str, Callable[[ir.Node], int]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Gemm": _gemm,
    "MatMul": _product,
}
