"""The plaintext of a key file: safetensors bytes, written deterministically and read strictly.

The bytes are ordinary safetensors and open with the `safetensors` package. They are read here by a
reader of our own because that package accepts more than a key file may hold. Whoever has a
recipient's public key can seal a file to it, so a payload that decrypts is still untrusted input:
the names, dtypes, ranks and metadata fields must be exactly the known ones, sizes are checked
before anything is allocated, and nothing that was read is quoted in an error.
`docs/keyfile-format.md` is the specification.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from diffveil.errors import KeyFileError

__all__ = ["MAX_HEADER_BYTES", "TensorSpec", "pack", "read_metadata", "unpack"]

MAX_HEADER_BYTES = 16384  # 1 KiB, and a public key's 63 bytes for each of 128 recipients
_MAX_DIMENSION = 1 << 20

# Little-endian, widest first: written in this order, every tensor is aligned to its item size.
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor of the payload may be.

    Attributes:
        dtypes: the safetensors dtype names that are accepted.
        ranks: the numbers of axes that are accepted.
    """

    dtypes: tuple[str, ...]
    ranks: tuple[int, ...]


def pack(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> bytearray:
    """Write tensors as safetensors bytes; equal input always gives equal bytes.

    Args:
        tensors: arrays of float64, float32, float16, uint16 or uint8, any shape, by name.
        metadata: text fields, stored under `__metadata__`.

    Returns:
        The bytes, in memory that the caller can wipe.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    entries: list[tuple[int, str, str, npt.NDArray[Any]]] = []
    for name, array in tensors.items():
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        entries.append((-little.itemsize, name, names[little.dtype], little))
    entries.sort(key=lambda entry: entry[:2])

    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for _, name, dtype, array in entries:
        end = position + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-len(text) % 8)
    data = bytearray(8 + len(text) + position)
    data[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
    end = 8 + len(text)
    for *_, array in entries:
        # Through a view: `tobytes` would leave a copy that nobody can wipe.
        target = np.frombuffer(data, array.dtype, array.size, end).reshape(array.shape)
        np.copyto(target, array)
        end += array.nbytes
    return data


def unpack(
    data: bytes | bytearray, expected: Mapping[str, TensorSpec], fields: frozenset[str]
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Read safetensors bytes that hold exactly the expected tensors and metadata fields.

    Args:
        data: the whole payload.
        expected: the tensors that must be present, and no others.
        fields: the metadata fields that must be present, and no others.

    Returns:
        The tensors (native byte order, own memory) and the metadata.

    Raises:
        KeyFileError: anything is missing, unknown, repeated, out of range or left over.
    """
    header, body = _split(data)
    metadata = _metadata(header)
    if set(metadata) != fields:
        _refuse(f"metadata fields must be exactly {', '.join(sorted(fields))}")
    del header["__metadata__"]
    if set(header) != set(expected):
        _refuse(f"tensors must be exactly {', '.join(sorted(expected))}")

    tensors: dict[str, npt.NDArray[Any]] = {}
    spans: list[tuple[int, int]] = []
    for name, spec in expected.items():
        dtype, shape, begin, end = _entry(name, header[name], spec, len(body))
        flat = np.frombuffer(body[begin:end], dtype=dtype)
        tensors[name] = flat.reshape(shape).astype(dtype.newbyteorder("="), copy=True)
        spans.append((begin, end))

    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            _refuse("tensors overlap or leave holes")
        position = end
    if position != len(body):
        _refuse("bytes follow the last tensor")
    return tensors, metadata


def read_metadata(data: bytes | bytearray) -> dict[str, str]:
    """Return the metadata fields alone, whatever they are: enough to see the format and version.

    Raises:
        KeyFileError: the header is malformed or has no metadata.
    """
    return _metadata(_split(data)[0])


def _metadata(header: Mapping[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict):
        _refuse("it has no metadata")
    if not all(isinstance(value, str) for value in metadata.values()):
        _refuse("metadata values must be text")
    return metadata


def _refuse(reason: str) -> NoReturn:
    raise KeyFileError(f"The key file's payload is not a recovery key: {reason}.")


def _split(data: bytes | bytearray) -> tuple[dict[str, Any], memoryview]:
    """Parse the JSON header; return it with the bytes that follow."""
    view = memoryview(data)
    if len(view) < 8:
        _refuse("it is shorter than a safetensors header")
    length = int.from_bytes(view[:8], "little")
    if length > MAX_HEADER_BYTES:
        _refuse(f"its header is larger than {MAX_HEADER_BYTES} bytes")
    if length > len(view) - 8:
        _refuse("its header is cut short")
    header: object = None
    try:
        text = bytes(view[8 : 8 + length]).decode("ascii")
        # Padding may only follow the object; json alone would accept white space in front as well.
        if text.startswith("{"):
            header = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        header = None  # raised below, outside this block: the parser's error quotes the document
    if not isinstance(header, dict):
        _refuse("its header is not a JSON object of known fields, each given once")
    return header, view[8 + length :]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("repeated name")
    return result


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError("not a JSON number")


def _entry(
    name: str, entry: object, spec: TensorSpec, available: int
) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Check one tensor's header entry; return dtype, shape, begin and end."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(f"tensor {name} must have exactly dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in spec.dtypes:
        _refuse(f"tensor {name} must be {' or '.join(spec.dtypes)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _integers(shape) or len(shape) not in spec.ranks:
        _refuse(f"tensor {name} must have {' or '.join(map(str, spec.ranks))} axes")
    if not all(1 <= size <= _MAX_DIMENSION for size in shape):
        _refuse(f"tensor {name} has an axis that is empty or longer than {_MAX_DIMENSION}")
    if not _integers(offsets) or len(offsets) != 2:
        _refuse(f"tensor {name} must have two data offsets")
    begin, end = offsets
    dtype = _DTYPES[entry["dtype"]]
    if not 0 <= begin <= end <= available or end - begin != math.prod(shape) * dtype.itemsize:
        _refuse(f"tensor {name} does not fill its part of the file")
    return dtype, tuple(shape), begin, end


def _integers(value: object) -> bool:
    """Whether this is a list of integers; `True` is an int to Python, not to the format."""
    return isinstance(value, list) and all(type(item) is int for item in value)
