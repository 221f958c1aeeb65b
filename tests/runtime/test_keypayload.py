"""The payload's strict reader against the safetensors package and against hostile headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from diffveil.errors import KeyFileError
from diffveil.keypayload import MAX_HEADER_BYTES, TensorSpec, pack, read_metadata, unpack

EXPECTED = {"a": TensorSpec(("F16", "F32"), (2,)), "b": TensorSpec(("F64",), (1,))}
FIELDS = frozenset({"format", "version"})
METADATA = {"format": "test", "version": "1"}


@pytest.fixture
def tensors() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(5)
    return {"a": rng.standard_normal((3, 5)).astype(np.float16), "b": rng.standard_normal(4)}


@pytest.fixture
def header() -> dict[str, Any]:
    return {
        "__metadata__": dict(METADATA),
        "b": {"dtype": "F64", "shape": [4], "data_offsets": [0, 32]},
        "a": {"dtype": "F16", "shape": [3, 5], "data_offsets": [32, 62]},
    }


def raw(header: object, body: bytes = bytes(62)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_round_trip(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    read, metadata = unpack(pack(tensors, METADATA), EXPECTED, FIELDS)
    assert metadata == METADATA
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor)


def test_the_safetensors_package_reads_what_is_packed(
    tensors: dict[str, np.ndarray[Any, Any]],
) -> None:
    read = safetensors.numpy.load(bytes(pack(tensors, METADATA)))
    assert sorted(read) == sorted(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor)


def test_what_the_safetensors_package_writes_is_unpacked(
    tensors: dict[str, np.ndarray[Any, Any]],
) -> None:
    read, metadata = unpack(safetensors.numpy.save(tensors, METADATA), EXPECTED, FIELDS)
    assert metadata == METADATA
    np.testing.assert_array_equal(read["a"], tensors["a"])


def test_packing_is_deterministic_and_aligned(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    data = pack(tensors, METADATA)
    shuffled = dict(reversed(tensors.items()))
    assert pack(shuffled, dict(reversed(METADATA.items()))) == data
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header["b"]["data_offsets"] == [0, 32]  # the widest dtype comes first


def test_the_fixture_itself_is_sound(header: dict[str, Any]) -> None:
    unpack(raw(header), EXPECTED, FIELDS)
    unpack(raw(json.dumps(header).encode() + b"   "), EXPECTED, FIELDS)  # padding is allowed


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Return an edit that sets the value at a path."""
    *keys, last, value = path

    def edit(header: dict[str, Any]) -> None:
        target: Any = header
        for key in keys:
            target = target[key]
        target[last] = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: header.pop("a"),
        lambda header: header.pop("__metadata__"),
        lambda header: header["__metadata__"].pop("format"),
        lambda header: header["a"].pop("shape"),
        _set("c", {"dtype": "F32", "shape": [0], "data_offsets": [62, 62]}),
        _set("__metadata__", []),
        _set("__metadata__", "extra", "field"),
        _set("__metadata__", "format", 1),
        _set("a", None),
        _set("a", "extra", 1),
        _set("a", "dtype", "F64"),
        _set("a", "dtype", ["F16"]),
        _set("b", "dtype", "I64"),
        _set("a", "shape", [15]),
        _set("a", "shape", [3, 6]),
        _set("a", "shape", [-3, -5]),
        _set("a", "shape", [True, 15]),
        _set("a", "shape", [3.0, 5.0]),
        _set("a", "shape", ["3", "5"]),
        _set("a", "shape", [0, 5]),
        _set("a", "shape", [2**63, 2**63]),
        _set("a", "shape", "35"),
        _set("a", "shape", {}),
        _set("a", "data_offsets", [32]),
        _set("a", "data_offsets", [62, 32]),
        _set("a", "data_offsets", [34, 64]),
        _set("a", "data_offsets", [-30, 0]),
        _set("a", "data_offsets", [0, 30]),  # inside b
        _set("a", "data_offsets", [32, 2**200]),
        _set("b", "data_offsets", [30, 62]),
        _set("b", "shape", [2**20 + 1]),
    ],
)
def test_hostile_entries(edit: Callable[[dict[str, Any]], None], header: dict[str, Any]) -> None:
    edit(header)
    with pytest.raises(KeyFileError, match="not a recovery key"):
        unpack(raw(header), EXPECTED, FIELDS)


def _text(change: Callable[[bytes], bytes]) -> Callable[[dict[str, Any]], bytes]:
    return lambda header: raw(change(json.dumps(header).encode()))


@pytest.mark.parametrize(
    "build",
    [
        lambda _: b"",
        lambda _: bytes(7),
        lambda _: bytes(8),
        lambda _: b"\xff" * 8 + b"{}",
        lambda _: (2**62).to_bytes(8, "little") + b"{}",
        lambda _: (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1),
        lambda _: raw(b"null"),
        lambda _: raw(b"[" * 4000),
        lambda _: raw(b'{"a":' * 1200),
        lambda _: raw(b'{"a":' + b"9" * 5000 + b"}"),
        lambda _: raw(b'{"a":NaN}'),
        lambda _: raw(b"{'a':1}"),
        lambda header: raw(header, bytes(61)),
        lambda header: raw(header, bytes(63)),
        _text(lambda text: b" " + text),
        _text(lambda text: text + b"{}"),
        _text(lambda text: text[:-1]),
        _text(lambda text: text.replace(b'"test"', b'"t\xc3\xa9st"')),
        _text(lambda text: text.replace(b'"test"', b'"t\xffst"')),
        _text(lambda text: text.replace(b'"version": "1"', b'"version": "1", "version": "1"')),
        _text(lambda text: text[:-1] + b', "b": ' + text.split(b'"b": ')[1].split(b"}")[0] + b"}}"),
        _text(lambda text: text.decode().encode("utf-16")),
    ],
)
def test_hostile_bytes(build: Callable[[dict[str, Any]], bytes], header: dict[str, Any]) -> None:
    data = build(header)
    with pytest.raises(KeyFileError, match="not a recovery key") as caught:
        unpack(data, EXPECTED, FIELDS)
    # The JSON parser's error carries the whole document as an attribute.
    assert caught.value.__context__ is None


def test_holes_between_tensors(header: dict[str, Any]) -> None:
    header["a"]["data_offsets"] = [34, 64]
    with pytest.raises(KeyFileError, match="holes"):
        unpack(raw(header, bytes(64)), EXPECTED, FIELDS)


def test_metadata_can_be_read_alone(header: dict[str, Any]) -> None:
    header["from the future"] = {"dtype": "F4"}
    assert read_metadata(raw(header)) == METADATA


_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_give_the_one_error(data: bytes) -> None:
    with pytest.raises(KeyFileError):
        unpack(data, EXPECTED, FIELDS)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["a", "b", "__metadata__", "c"]),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "format", "other"]),
    value=_VALUES,
    whole=st.booleans(),
)
def test_any_value_anywhere_is_read_or_refused(
    name: str, field: str, value: object, whole: bool
) -> None:
    header: dict[str, Any] = {
        "__metadata__": dict(METADATA),
        "b": {"dtype": "F64", "shape": [4], "data_offsets": [0, 32]},
        "a": {"dtype": "F16", "shape": [3, 5], "data_offsets": [32, 62]},
    }
    if whole or name == "c":
        header[name] = value
    else:
        header[name][field] = value
    try:
        tensors, metadata = unpack(raw(header), EXPECTED, FIELDS)
    except KeyFileError:
        return
    # What is accepted is exactly what was asked for.
    assert set(metadata) == FIELDS
    assert {name: tensor.ndim for name, tensor in tensors.items()} == {"a": 2, "b": 1}
    assert tensors["a"].nbytes + tensors["b"].nbytes == 62
