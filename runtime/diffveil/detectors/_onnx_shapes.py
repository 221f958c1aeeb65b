"""Make an ONNX file that declares a fixed input size accept any size.

CenterFace's published file declares a batch of ten 32×32 pictures, although every node of it is
a convolution or pointwise. ONNX Runtime refuses other sizes, and the `onnx` package, which could
edit the declaration, is too heavy for a runtime. The change is small enough for the protobuf wire
format itself (https://protobuf.dev/programming-guides/encoding/); field numbers are those of
onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["with_free_sizes"]

_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE_INFO = 5, 11, 12, 13
_INITIALIZER_NAME = 8
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_PARAM = 1, 2, 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def with_free_sizes(model: bytes) -> bytes:
    """Free the batch and size axes of an image network's inputs and outputs.

    Weights also listed as inputs (files of IR version 3 did so) are removed from the inputs, so
    that ONNX Runtime folds them as constants, and recorded shapes of inner values are dropped.

    Args:
        model: Serialized ModelProto whose inputs and outputs are [batch, channels, height, width].

    Raises:
        ValueError: The bytes are not a protobuf message of this kind.
    """
    return b"".join(
        _field(number, _free_graph(value)) if number == _MODEL_GRAPH else raw
        for number, value, raw in _fields(model)
    )


def _free_graph(graph: bytes) -> bytes:
    """GraphProto with symbolic sizes."""
    fields = list(_fields(graph))
    weights = {
        _first(value, _INITIALIZER_NAME)
        for number, value, _ in fields
        if number == _GRAPH_INITIALIZER
    }
    parts = []
    for number, value, raw in fields:
        if number == _GRAPH_INPUT and _first(value, _VALUE_NAME) in weights:
            continue
        if number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            # Output sizes follow from the input's: names of their own keep them unconstrained.
            raw = _field(number, _free_value(value, b"in" if number == _GRAPH_INPUT else b"out"))
        if number != _GRAPH_VALUE_INFO:
            parts.append(raw)
    return b"".join(parts)


def _free_value(value: bytes, prefix: bytes) -> bytes:
    """ValueInfoProto whose axes 0, 2 and 3 are symbols."""
    tensor = _first(_first(value, _VALUE_TYPE), _TYPE_TENSOR)
    axes = [axis for number, axis, _ in _fields(_first(tensor, _TENSOR_SHAPE)) if number]
    if len(axes) != 4:
        raise ValueError("expected inputs and outputs of four axes")
    for index, name in ((0, b"batch"), (2, b"height"), (3, b"width")):
        axes[index] = _field(_DIM_PARAM, prefix + b"_" + name)
    shape = b"".join(_field(_SHAPE_DIM, axis) for axis in axes)
    kept = b"".join(raw for number, _, raw in _fields(tensor) if number != _TENSOR_SHAPE)
    tensor = kept + _field(_TENSOR_SHAPE, shape)
    name = _first(value, _VALUE_NAME)
    return _field(_VALUE_NAME, name) + _field(_VALUE_TYPE, _field(_TYPE_TENSOR, tensor))


def _first(message: bytes, wanted: int) -> bytes:
    """The first occurrence of a field, or nothing."""
    return next((value for number, value, _ in _fields(message) if number == wanted), b"")


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Field number, content (empty unless length-delimited) and encoded field, in order."""
    position = 0
    while position < len(message):
        start = position
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        content = b""
        if wire == _VARINT:
            _, position = _varint(message, position)
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            length, position = _varint(message, position)
            content = message[position : position + length]
            position += length
        else:
            raise ValueError(f"unknown wire type {wire}")
        if position > len(message) or number == 0:
            raise ValueError("truncated or malformed message")
        yield number, content, message[start:position]


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A base-128 number and the position behind it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("truncated number")
        byte = message[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("number of more than ten bytes")


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _encoded(number << 3 | _BYTES) + _encoded(len(content)) + content


def _encoded(number: int) -> bytes:
    """A base-128 number."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
