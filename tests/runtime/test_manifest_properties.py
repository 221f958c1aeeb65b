"""Whatever a manifest says, reading it ends in a manifest or in one of the documented errors."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffveil._manifest import Manifest, parse_manifest
from diffveil.bundle import MANIFEST_FILE, Bundle
from diffveil.errors import BundleCorruptError, BundleError

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def content(tiny_bundle_path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((tiny_bundle_path / MANIFEST_FILE).read_text())
    return loaded


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [path] + [p for key, inner in items for p in _places(inner, (*path, key))]


def _parent(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        content = content[key]
    return content


def _parse(content: Any) -> Manifest | None:
    try:
        return parse_manifest(content)
    except BundleError:
        return None


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_replaced_value_is_read_or_refused(
    content: dict[str, Any], data: st.DataObject
) -> None:
    changed = copy.deepcopy(content)
    path = data.draw(st.sampled_from(_places(content)[1:]))
    _parent(changed, path)[path[-1]] = data.draw(_JSON)
    _parse(changed)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_missing_field_is_refused_or_optional(
    content: dict[str, Any], data: st.DataObject
) -> None:
    changed = copy.deepcopy(content)
    fields = [p for p in _places(content) if p and isinstance(p[-1], str)]
    path = data.draw(st.sampled_from(fields))
    del _parent(changed, path)[path[-1]]
    optional = {"precision", "loss_scale", "cost", "cosine", "norm_ratio"}
    free = path[0] in ("provenance", "thresholds", "files") and len(path) > 1
    if _parse(changed) is not None:
        assert path[-1] in optional or free, path


@given(data=st.data(), name=st.text(min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_unknown_fields_are_refused(
    content: dict[str, Any], data: st.DataObject, name: str
) -> None:
    """A field that is not understood might change what the others mean."""
    changed = copy.deepcopy(content)
    objects = [
        path
        for path in _places(content)
        if path[:1] not in (("provenance",), ("thresholds",), ("files",))
        and isinstance(_parent(content, (*path, None)), dict)
    ]
    place = _parent(changed, (*data.draw(st.sampled_from(objects)), None))
    if name not in place and name not in {"precision", "loss_scale", "cost"}:
        place[name] = 1
        assert _parse(changed) is None


@given(value=_JSON)
@settings(max_examples=100, deadline=None)
def test_anything_else_is_no_manifest(value: Any) -> None:
    assert _parse(value) is None


@given(raw=st.binary(max_size=300))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_arbitrary_bytes_are_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(raw)
    with pytest.raises(BundleError):
        Bundle.load(tmp_path)


@pytest.fixture(scope="module")
def scratch(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle that tests damage and mend again."""
    return Path(shutil.copytree(tiny_bundle_path, tmp_path_factory.mktemp("scratch") / "bundle"))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_in_any_file_is_found(scratch: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(f for f in scratch.iterdir() if f.is_file())))
    size = file.stat().st_size
    place, flip = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 255))
    original = file.read_bytes()
    damaged = bytearray(original)
    damaged[place] ^= flip
    file.write_bytes(damaged)
    try:
        if file.name == MANIFEST_FILE:
            before = json.loads(original)
            try:
                bundle = Bundle.load(scratch)
                bundle.verify(full=True)
            except BundleError:
                return
            # What is left: words for people and figures of the record, which decide nothing. A
            # fingerprint covers the rest, and keys are bound to it.
            after = json.loads(damaged)
            for part in ("format", "version", "image_size", "latent", "prediction", "files"):
                assert after[part] == before[part]
        else:
            with pytest.raises(BundleCorruptError, match=file.name):
                Bundle.load(scratch).verify(full=True)
    finally:
        file.write_bytes(original)
