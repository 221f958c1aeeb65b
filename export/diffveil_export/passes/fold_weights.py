"""Restores compactly stored weights: the nodes that unpack constants become their results.

Rules, for nodes of the main graph whose inputs are all initializers:

1. `DequantizeLinear`, for a tensor, along an axis or in blocks, with or without a zero point,
   becomes an initializer of its output's dtype.
2. `Cast` from one floating-point dtype to another becomes an initializer of the target dtype.
3. A node that reads what rule 1 or 2 made is folded too.
4. Nodes whose results leave the graph, and initializers that a caller may override, stay.

Results are computed when they are written, one at a time, so memory holds one weight, not all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["FoldWeights"]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

_Array = NDArray[np.generic]


class FoldWeights(ir.passes.InPlacePass):
    """Computes `DequantizeLinear` and `Cast` of constants. See the module for the rules.

    Args:
        only_blocks: Leave alone what rule 1 says but for blocks, and what rule 2 says but for their
            scales.
    """

    def __init__(self, *, only_blocks: bool = False) -> None:
        super().__init__()
        self._only_blocks = only_blocks

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold; `modified` says whether anything was found."""
        modified = False
        for node in list(model.graph):  # in topological order, so chains fold in one go
            if self._only_blocks and not _in_blocks(node):
                continue
            tensor = _folded(node)
            if tensor is None:
                continue
            (output,) = node.outputs
            value = ir.Value(
                name=f"{output.name}.folded",
                shape=tensor.shape,
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            model.graph.register_initializer(value)
            ir.convenience.replace_all_uses_with(output, value)
            inputs = [i for i in node.inputs if i is not None]
            model.graph.remove(node, safe=True)
            for unused in inputs:
                if not unused.uses():
                    model.graph.initializers.pop(unused.name or "", None)
            modified = True
        return ir.passes.PassResult(model, modified)


def _folded(node: ir.Node) -> ir.LazyTensor | None:
    if node.domain or node.op_type not in ("DequantizeLinear", "Cast"):
        return None
    constants = [_constant(i) for i in node.inputs if i is not None]
    if not constants or None in constants or node.outputs[0].is_graph_output():
        return None
    tensors = [tensor for tensor in constants if tensor is not None]
    return _cast(node, tensors) if node.op_type == "Cast" else _dequantize(node, tensors)


def _in_blocks(node: ir.Node) -> bool:
    """Whether a node restores weights in blocks, or the scales of such."""
    if node.op_type == "Cast":
        users = [user for user, _ in node.outputs[0].uses()]
        return bool(users) and all(map(_in_blocks, users))
    block = node.attributes.get("block_size") if node.op_type == "DequantizeLinear" else None
    return block is not None and block.as_int() != 0


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    if not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def _cast(node: ir.Node, tensors: list[ir.TensorProtocol]) -> ir.LazyTensor | None:
    (source,) = tensors
    target = ir.DataType(node.attributes["to"].as_int())
    if source.dtype not in _FLOATS or target not in _FLOATS:
        return None
    return _lazy(node, source, target, lambda: source.numpy())


def _dequantize(node: ir.Node, tensors: list[ir.TensorProtocol]) -> ir.LazyTensor | None:
    source, scale, *zero = tensors
    attributes = node.attributes
    block = attributes["block_size"].as_int() if _in_blocks(node) else 0
    axis = attributes["axis"].as_int() if "axis" in attributes else 1
    target = scale.dtype
    if "output_dtype" in attributes and attributes["output_dtype"].as_int() != 0:
        target = ir.DataType(attributes["output_dtype"].as_int())
    if target not in _FLOATS:
        return None

    def spread(factors: NDArray[Any]) -> NDArray[Any]:
        """Scales or zero points, of a shape that goes with the integers'."""
        if block:
            whole = np.repeat(factors, block, axis)  # the last block may be cut short
            return np.take(whole, range(int(source.shape.numpy()[axis])), axis)
        shape = [1] * len(source.shape)
        if factors.ndim == 1:
            shape[axis] = -1
        return factors.reshape(shape)

    def compute() -> _Array:
        integers = source.numpy().astype(np.int32)
        if zero:
            integers = integers - spread(zero[0].numpy().astype(np.int32))
        # An 8-bit integer times a 16-bit float is exact in float32: rounding happens once.
        result: _Array = integers.astype(np.float32) * spread(scale.numpy().astype(np.float32))
        return result

    return _lazy(node, source, target, compute)


def _lazy(
    node: ir.Node,
    source: ir.TensorProtocol,
    target: ir.DataType,
    compute: Callable[[], _Array],
) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):  # ONNX's Cast turns what is too large into infinity
            return ir.tensor(compute().astype(target.numpy()), dtype=target)

    shape = ir.Shape([int(size) for size in source.shape.numpy()])
    return ir.LazyTensor(evaluate, target, shape, name=f"{node.outputs[0].name}.folded")
