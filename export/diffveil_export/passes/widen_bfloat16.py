"""Makes a bfloat16 graph runnable where no bfloat16 kernels exist, result for result.

A CPU has few bfloat16 kernels, so a program in bfloat16 is checked on a copy that computes every
node in float32 and rounds what it returns to bfloat16, which is what those kernels do inside.

Rules, for nodes of the main graph:

1. A node with a bfloat16 input or output reads float32 copies of such inputs, and writes float32
   that a `Cast` rounds to bfloat16 under the output's old name.
2. `Cast` itself stays: it exists everywhere. One that made bfloat16 still rounds.
3. A `Cast` that restores float32 from what rule 1 just rounded is not skipped: the rounding is
   the point.
4. Subgraphs are refused: programs have none.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["WidenBFloat16"]

_FLOAT, _BFLOAT16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16


class WidenBFloat16(ir.passes.InPlacePass):
    """Computes bfloat16 nodes in float32 and rounds their results. See the module for the rules."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Widen; `modified` says whether there was any bfloat16.

        Raises:
            ValueError: The graph has subgraphs.
        """
        widened: dict[ir.Value, ir.Value] = {}
        modified = False
        for node in list(model.graph):
            kinds = {attribute.type for attribute in node.attributes.values()}
            if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
                raise ValueError(f"node '{node.name}' has a subgraph")
            if node.op_type == "Cast":
                continue
            touched = False
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype != _BFLOAT16:
                    continue
                if value not in widened:
                    cast = _cast(value, _FLOAT)
                    model.graph.insert_before(node, cast)
                    widened[value] = cast.outputs[0]
                node.replace_input_with(index, widened[value])
                touched = True
            for output in node.outputs:
                if output.dtype != _BFLOAT16:
                    continue
                _round(model, node, output)
                touched = True
            modified = modified or touched
        return ir.passes.PassResult(model, modified)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    result = ir.Value(
        name=f"{value.name}.{dtype.name.lower()}", type=ir.TensorType(dtype), shape=value.shape
    )
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], outputs=[result])


def _round(model: ir.Model, node: ir.Node, output: ir.Value) -> None:
    """Put a rounding `Cast` between an output and its readers."""
    readers = list(output.uses())
    output.type = ir.TensorType(_FLOAT)
    cast = _cast(output, _BFLOAT16)
    model.graph.insert_after(node, cast)
    for reader, index in readers:
        reader.replace_input_with(index, cast.outputs[0])
