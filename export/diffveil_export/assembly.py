"""Puts one ONNX graph together from several, weights and all.

Weights that lie in a file beside the graphs stay there: the whole refers to the same bytes as its
parts do. A part that is added again shares its constants, and what is computed from constants
alone, with its first copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from diffveil.errors import OptionError
from diffveil.programs import Dimensions, TensorSpec

__all__ = ["Assembly"]

_TYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64}


class Assembly:
    """A graph that grows part by part.

    Args:
        dimensions: Sizes of the bundle's fixed axes.
    """

    def __init__(self, dimensions: Dimensions) -> None:
        self._dimensions = dimensions
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []
        self._opsets: dict[str, int] = {}
        self._ir_version = 0
        self._constants: dict[tuple[str, str], ir.Value] = {}
        self._parts = 0

    def input(self, tensor: TensorSpec, name: str | None = None) -> ir.Value:
        """A new input of the graph, named as declared or otherwise."""
        value = ir.Value(
            name=name or tensor.name,
            shape=ir.Shape(tensor.shape(self._dimensions)),
            type=ir.TensorType(_TYPES[tensor.dtype]),
        )
        self._inputs.append(value)
        return value

    def add(
        self, part: str, model: ir.Model, inputs: Mapping[str, ir.Value]
    ) -> dict[str, ir.Value]:
        """Append a graph.

        Args:
            part: What the graph is; one part's graphs must be equal.
            model: Taken apart: it is of no use afterwards.
            inputs: What its inputs are in the whole, by name; more than it has are ignored.

        Returns:
            Its outputs in the whole, by name; floats among them are float32.

        Raises:
            OptionError: It needs another version of an operator set than the parts before, has
                functions or subgraphs, or an input is not given.
        """
        self._check(part, model, inputs)
        graph = model.graph
        results = {str(value.name): value for value in graph.outputs}
        prefix = f"{part}.{self._parts}."
        self._parts += 1
        for value in list(graph.inputs):
            given = self._cast(inputs[str(value.name)], value.dtype, f"{prefix}{value.name}")
            ir.convenience.replace_all_uses_with(value, given)
        graph.inputs.clear()
        graph.outputs.clear()

        constant: set[ir.Value] = set()
        for name, value in list(graph.initializers.items()):
            del graph.initializers[name]
            if not self._shared(part, value, constant):
                value.name = prefix + name
                self._initializers.append(value)
        nodes = list(graph)
        graph.remove(nodes)
        for node in nodes:
            fixed = all(value is None or value in constant for value in node.inputs)
            if fixed and node.outputs[0] not in results.values():
                copies = [self._shared(part, value, constant) for value in node.outputs]
                if all(copies):
                    continue  # its first copy computes the same
            node.name = prefix + (node.name or "")
            for value in node.outputs:
                value.name = prefix + (value.name or "")
            self._nodes.append(node)
        return {
            name: self._cast(value, ir.DataType.FLOAT, f"{prefix}{name}")
            if value.dtype is not None and value.dtype.is_floating_point()
            else value
            for name, value in results.items()
        }

    def model(self, outputs: Sequence[tuple[TensorSpec, ir.Value]]) -> ir.Model:
        """The whole.

        Args:
            outputs: Its outputs, in order, with their names and shapes.
        """
        values = []
        for tensor, value in outputs:
            # A new value: one may leave under two names, or be an input of the whole.
            node = ir.node("Identity", [value], name=f"output.{tensor.name}")
            result = node.outputs[0]
            result.name, result.type = tensor.name, ir.TensorType(_TYPES[tensor.dtype])
            result.shape = ir.Shape(tensor.shape(self._dimensions))
            self._nodes.append(node)
            values.append(result)
        graph = ir.Graph(
            self._inputs,
            values,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports=self._opsets,
            name="main_graph",
        )
        return ir.Model(graph, ir_version=self._ir_version)

    def _shared(self, part: str, value: ir.Value, constant: set[ir.Value]) -> bool:
        """Note a constant; whether an earlier copy of it took its place."""
        first = self._constants.setdefault((part, str(value.name)), value)
        constant.add(first)
        if first is value:
            return False
        ir.convenience.replace_all_uses_with(value, first)
        return True

    def _cast(self, value: ir.Value, dtype: ir.DataType | None, name: str) -> ir.Value:
        """The value in a float dtype; itself if it is."""
        if dtype is None or value.dtype in (dtype, None):
            return value
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}.cast")
        result = node.outputs[0]
        result.name, result.type = f"{name}.{dtype.name.lower()}", ir.TensorType(dtype)
        result.shape = value.shape
        self._nodes.append(node)
        return result

    def _check(self, part: str, model: ir.Model, inputs: Mapping[str, ir.Value]) -> None:
        graph = model.graph
        problems = [
            f"it is written in version {version} of operator set '{domain or 'ai.onnx'}', what it "
            f"is joined with in {self._opsets[domain]}"
            for domain, version in graph.opset_imports.items()
            if self._opsets.get(domain, version) != version
        ]
        if model.functions or len(list(graph.all_nodes())) != len(graph):
            problems.append("it has functions or subgraphs")
        missing = [str(v.name) for v in graph.inputs if v.name not in inputs]
        if missing:
            problems.append(f"nothing is given for {', '.join(missing)}")
        if problems:
            raise OptionError(f"'{part}' cannot be joined: " + "; ".join(problems))
        self._opsets |= graph.opset_imports
        self._ir_version = max(self._ir_version, model.ir_version)
