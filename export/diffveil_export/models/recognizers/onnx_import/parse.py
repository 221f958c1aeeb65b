"""Reads an ONNX file into plain Python: nodes, constants, one input, one output.

A file from elsewhere is not trusted: sizes are checked before memory is taken, tensors outside the
file must lie in its folder, and nothing in it is executed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from diffveil.errors import OptionError

__all__ = ["MAX_BYTES", "Graph", "Node", "read_graph"]

MAX_BYTES = 2 << 30
"""Most bytes that a file, and all tensors together, may have: protobuf's own limit."""

_OPSETS = range(7, 27)
_REAL = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_WHOLE = {TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.UINT8}
_WHOLE |= {TensorProto.INT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.UINT32}
_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes:
        op: Type of the operator, with its domain if that is not ONNX's own.
        name: Name of the node, or of its first output where it has none.
        inputs: Names of values; empty where an optional input is left out.
        outputs: Names of values.
        attributes: By name; tensors are arrays.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.op} '{self.name}'"


@dataclass(frozen=True)
class Graph:
    """A graph with one input and one output.

    Attributes:
        nodes: Those that the output depends on, in an order in which they can run.
        constants: Arrays by name: float32 or int64.
        input: Name of the input.
        input_shape: Its declared sizes; None where a size is not fixed.
        output: Name of the output.
        opset: Version of ONNX's operators.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, NDArray[Any]]
    input: str
    input_shape: tuple[int | None, ...]
    output: str
    opset: int


def read_graph(file: Path) -> Graph:
    """Read `file`.

    Half-precision constants become float32. Of several outputs the first is taken, and nodes that
    it does not depend on are left out.

    Raises:
        OptionError: Not an ONNX model, too large, not valid, or not a graph of one input; data
            outside the file's folder.
    """
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise OptionError(f"'{file}': {size} bytes, expected at most {MAX_BYTES}")
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf has several classes of its own
        raise OptionError(f"'{file}' is not an ONNX model: {error}") from error
    tensors = _all_tensors(model.graph)
    _check_sizes(file, tensors)
    try:  # by path: the checker then finds external data, and no copy is made
        onnx.checker.check_model(str(file))
    except Exception as error:  # ValidationError, and others where inference of shapes fails
        raise OptionError(f"'{file}' is not a valid ONNX model: {error}") from error
    opset = max((o.version for o in model.opset_import if o.domain in _DOMAINS), default=0)
    if opset not in _OPSETS:
        raise OptionError(
            f"'{file}': operator set {opset}, expected {_OPSETS[0]}…{_OPSETS[-1]}; convert it "
            "with onnx.version_converter"
        )
    constants = {t.name: _array(file, t) for t in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or not model.graph.output:
        raise OptionError(
            f"'{file}': expected one input, an image, and an output, received the inputs "
            f"{[v.name for v in inputs]} and the outputs {[v.name for v in model.graph.output]}"
        )
    output = model.graph.output[0].name
    nodes = [_node(file, proto) for proto in _needed(model.graph.node, output)]
    shape = inputs[0].type.tensor_type.shape.dim
    return Graph(
        nodes=tuple(nodes),
        constants=constants,
        input=inputs[0].name,
        input_shape=tuple(d.dim_value if d.dim_value > 0 else None for d in shape),
        output=output,
        opset=opset,
    )


def _all_tensors(graph: onnx.GraphProto) -> list[TensorProto]:
    """Initializers and tensors in attributes; subgraphs are unsupported and not searched."""
    if graph.sparse_initializer:
        raise OptionError("sparse initializers are not supported; store them dense")
    attributes = [a for node in graph.node for a in node.attribute]
    tensors = [a.t for a in attributes if a.type == onnx.AttributeProto.TENSOR]
    tensors += [t for a in attributes for t in a.tensors]
    return [*graph.initializer, *tensors]


def _check_sizes(file: Path, tensors: Sequence[TensorProto]) -> None:
    """Compare what tensors claim to be with the bytes that are there, before any is read."""
    problems, total = [], 0
    for tensor in tensors:
        label = f"tensor '{tensor.name}'"
        if tensor.data_type not in _REAL | _WHOLE:
            kind = TensorProto.DataType.Name(tensor.data_type)
            problems.append(f"{label}: type {kind}, expected floating point, integer or bool")
            continue
        count = math.prod(tensor.dims)
        if any(d < 0 for d in tensor.dims):
            problems.append(f"{label}: negative size in {list(tensor.dims)}")
            continue
        claimed = count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        total += claimed
        if tensor.data_location == TensorProto.EXTERNAL:
            problems += [f"{label}: {p}" for p in _external_problems(file, tensor, claimed)]
        elif tensor.raw_data:
            if len(tensor.raw_data) != claimed:
                problems.append(f"{label}: {len(tensor.raw_data)} bytes, expected {claimed}")
        else:
            field = helper.tensor_dtype_to_field(tensor.data_type)
            if (received := len(getattr(tensor, field))) != count:
                problems.append(f"{label}: {received} numbers, expected {count}")
    if total > MAX_BYTES:
        problems.append(f"all tensors: {total} bytes, expected at most {MAX_BYTES}")
    if problems:
        raise OptionError(f"'{file}': " + "; ".join(problems))


def _location(file: Path, tensor: TensorProto) -> tuple[Path, int, int | None]:
    """File, first byte and number of bytes of external data."""
    entries = {e.key: e.value for e in tensor.external_data}
    length = entries.get("length")
    return (
        file.parent / entries.get("location", ""),
        int(entries.get("offset", "0")),
        None if length is None else int(length),
    )


def _external_problems(file: Path, tensor: TensorProto, claimed: int) -> list[str]:
    try:
        path, offset, length = _location(file, tensor)
    except ValueError:
        return ["offset or length of its external data is not a number"]
    # Links are resolved first: one must not lead out of the folder either.
    if not path.resolve().is_relative_to(file.parent.resolve()) or not path.is_file():
        return [f"external data '{path.name}' is not a file in the model's folder"]
    problems = []
    if length is not None and length != claimed:
        problems.append(f"{length} bytes of external data, expected {claimed}")
    if offset < 0 or offset + claimed > path.stat().st_size:
        problems.append(f"bytes {offset}…{offset + claimed} lie outside '{path.name}'")
    return problems


def _array(file: Path, tensor: TensorProto) -> NDArray[Any]:
    """A tensor as float32 or int64."""
    if tensor.data_location == TensorProto.EXTERNAL:
        path, offset, _ = _location(file, tensor)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).newbyteorder("<")
        count = math.prod(tensor.dims)
        array = np.fromfile(path, dtype, count, offset=offset).reshape(tuple(tensor.dims))
    else:
        array = numpy_helper.to_array(tensor)
    # A copy in any case: the original is a view of read-only bytes of the whole file.
    return np.array(array, np.float32 if tensor.data_type in _REAL else np.int64)


def _needed(nodes: Sequence[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """The nodes that an output depends on; the checker has seen that they are sorted."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]


def _node(file: Path, proto: onnx.NodeProto) -> Node:
    attributes = {}
    for attribute in proto.attribute:
        value: Any = helper.get_attribute_value(attribute)
        if isinstance(value, TensorProto):
            value = _array(file, value)
        elif isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        attributes[attribute.name] = value
    return Node(
        op=proto.op_type if proto.domain in _DOMAINS else f"{proto.domain}::{proto.op_type}",
        name=proto.name or (proto.output[0] if proto.output else "?"),
        inputs=tuple(proto.input),
        outputs=tuple(proto.output),
        attributes=attributes,
    )
