"""Reading bundles: strict about the manifest, certain about every byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffveil._manifest import parse_manifest
from diffveil.bundle import CONSTANTS_FILE, MANIFEST_FILE, Bundle
from diffveil.errors import BundleCorruptError, BundleError, BundleVersionError
from diffveil.programs import PROGRAMS
from diffveil.schedule import NoiseSchedule


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle_path, tmp_path / "bundle"))


@pytest.fixture
def content(tiny_bundle_path: Path) -> dict[str, Any]:
    """The tiny bundle's manifest as JSON."""
    result: dict[str, Any] = json.loads((tiny_bundle_path / MANIFEST_FILE).read_text())
    return result


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST_FILE).read_text())
    change(content)
    (folder / MANIFEST_FILE).write_text(json.dumps(content))


def test_says_what_it_is(tiny_bundle: Bundle) -> None:
    assert tiny_bundle.name == "tiny"
    assert tiny_bundle.image_size == 32
    d = tiny_bundle.dimensions
    assert (d.latent_channels, d.latent_size, d.stages) == (8, 4, 10)
    assert tiny_bundle.template.shape == (5, 2)
    assert tiny_bundle.manifest.schedule == NoiseSchedule()
    assert tiny_bundle.manifest.provenance["weights_stored"] == "int8"
    assert set(tiny_bundle.manifest.programs) == set(PROGRAMS)
    tiny_bundle.verify(full=True)


def test_unconditional_is_read_only_and_right(tiny_bundle: Bundle) -> None:
    constant = tiny_bundle.unconditional
    d = tiny_bundle.dimensions
    assert constant.shape == (1, d.conditioning_length, d.conditioning_width)
    assert constant.dtype == np.float32
    assert np.abs(constant).max() > 0
    with pytest.raises(ValueError, match="read-only"):
        constant[0, 0, 0] = 1


def test_fingerprint_covers_what_decides_recovery_and_nothing_else(copy: Path) -> None:
    original = Bundle.load(copy).fingerprint
    assert len(original) == 64
    _rewrite(copy, lambda c: c.update(name="renamed", licence="other", provenance={}))
    _rewrite(copy, lambda c: c["programs"]["decode"].update(parity=[]))
    assert Bundle.load(copy).fingerprint == original
    _rewrite(copy, lambda c: c["programs"]["decode"].update(sha256="0" * 64))
    assert Bundle.load(copy).fingerprint != original


def test_fingerprint_covers_weights_and_schedule(copy: Path) -> None:
    original = Bundle.load(copy).fingerprint
    _rewrite(copy, lambda c: c["schedule"].update(beta_end=0.013))
    changed = Bundle.load(copy).fingerprint
    _rewrite(copy, lambda c: c["files"]["weights.bin"].update(sha256="1" * 64))
    assert len({original, changed, Bundle.load(copy).fingerprint}) == 3


def _use(bundle: Bundle, file: str) -> object:
    """Do something that reads `file`."""
    if file == CONSTANTS_FILE:
        return bundle.unconditional
    return bundle.program_path("guide" if file == "weights.bin" else file.removesuffix(".onnx"))


@pytest.mark.parametrize("name", [*(f"{p}.onnx" for p in PROGRAMS), "weights.bin", CONSTANTS_FILE])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_a_flipped_bit_is_found_before_use(copy: Path, name: str, where: float) -> None:
    file = copy / name
    raw = bytearray(file.read_bytes())
    raw[int(where * len(raw)) if where >= 0 else -1] ^= 0x10
    file.write_bytes(raw)
    bundle = Bundle.load(copy)
    with pytest.raises(BundleCorruptError, match=name):
        bundle.verify(full=True)
    with pytest.raises(BundleCorruptError, match=name):
        _use(bundle, name)


def test_missing_and_resized_files_are_found_on_load(copy: Path) -> None:
    with (copy / "decode.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(BundleCorruptError, match=r"decode\.onnx.*bytes"):
        Bundle.load(copy)
    (copy / "decode.onnx").unlink()
    with pytest.raises(BundleCorruptError, match=r"decode\.onnx"):
        Bundle.load(copy)
    (copy / "decode.onnx").mkdir()
    with pytest.raises(BundleCorruptError, match=r"decode\.onnx"):
        Bundle.load(copy)


def test_links_out_of_the_folder_are_refused(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    (copy / "decode.onnx").rename(outside)
    (copy / "decode.onnx").symlink_to(outside)
    with pytest.raises(BundleCorruptError, match="inside"):
        Bundle.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "x"}', "[" * 100_000])
def test_what_is_no_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / MANIFEST_FILE).write_text(text)
    with pytest.raises(BundleError):
        Bundle.load(copy)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.load(tmp_path / "nowhere")


def test_a_huge_manifest_is_not_read(copy: Path) -> None:
    (copy / MANIFEST_FILE).write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(BundleError, match="larger"):
        Bundle.load(copy)


def test_repeated_fields_and_nan_are_refused(copy: Path) -> None:
    text = (copy / MANIFEST_FILE).read_text()
    (copy / MANIFEST_FILE).write_text(text.replace("{", '{"name": "twice",', 1))
    with pytest.raises(BundleError, match="twice"):
        Bundle.load(copy)
    (copy / MANIFEST_FILE).write_text(text.replace("0.012", "NaN"))
    with pytest.raises(BundleError, match="NaN"):
        Bundle.load(copy)


@pytest.mark.parametrize("version", [0, 2, "1", None, 10**9])
def test_other_versions_say_so(content: dict[str, Any], version: object) -> None:
    content["version"] = version
    with pytest.raises(BundleVersionError, match="version"):
        parse_manifest(content)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown field": (lambda c: c.update(extra=1), "extra: unknown"),
    "missing field": (lambda c: c.pop("template"), "template: missing"),
    "size of text": (lambda c: c.update(image_size="32"), "image_size"),
    "size of bool": (lambda c: c.update(image_size=True), "image_size"),
    "size too large": (lambda c: c.update(image_size=10**9), "image_size"),
    "stages": (lambda c: c["tokens"].update(stages=9), "tokens.stages"),
    "prediction": (lambda c: c.update(prediction="v"), "prediction"),
    "template": (lambda c: c.update(template=[[1, 2]] * 4), "template"),
    "schedule": (lambda c: c["schedule"].update(beta_start=0.5), "beta_end"),
    "infinite": (lambda c: c["schedule"].update(beta_end=float("inf")), "beta_end"),
    "huge": (lambda c: c["schedule"].update(beta_end=10**400), "beta_end"),
    "threshold": (lambda c: c.update(thresholds={"far_1e-2": 2}), "thresholds"),
    "program missing": (lambda c: c["programs"].pop("guide"), "programs.guide"),
    "program unknown": (lambda c: c["programs"].update(shell={}), "programs.shell"),
    "parts": (lambda c: c["programs"]["encode"].update(parts=["shell"]), "programs.encode.parts"),
    "no parts": (lambda c: c["programs"]["encode"].update(parts="guide"), "programs.encode.parts"),
    "path": (lambda c: c["programs"]["encode"].update(file="../x"), "programs.encode.file"),
    "absolute": (lambda c: c["programs"]["encode"].update(file="/etc/x"), "programs.encode.file"),
    "hidden": (lambda c: c["files"].update({".x": {"sha256": "0" * 64, "bytes": 1}}), "files..x"),
    "hash": (lambda c: c["programs"]["encode"].update(sha256="00"), "programs.encode.sha256"),
    "data": (lambda c: c["programs"]["encode"].update(data=["other.bin"]), "files.other.bin"),
    "constants": (lambda c: c["files"].pop(CONSTANTS_FILE), CONSTANTS_FILE),
    "tensor name": (
        lambda c: c["programs"]["encode"]["inputs"][0].update(name="photo"),
        "inputs.image.name",
    ),
    "tensor shape": (
        lambda c: c["programs"]["encode"]["outputs"][0].update(shape=["B", 8, 4, 5]),
        "outputs.latent.shape",
    ),
    "tensor dtype": (
        lambda c: c["programs"]["denoise"]["inputs"][1].update(dtype="float32"),
        "inputs.timestep.dtype",
    ),
    "tensor missing": (lambda c: c["programs"]["guide"]["outputs"].pop(), "guide.outputs"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_fields_are_named(content: dict[str, Any], name: str) -> None:
    change, path = CHANGES[name]
    change(content)
    with pytest.raises(BundleError) as caught:
        parse_manifest(content)
    assert path in str(caught.value)


def test_all_problems_are_reported_at_once(content: dict[str, Any]) -> None:
    content.update(image_size=-1, prediction="v")
    content.pop("licence")
    with pytest.raises(BundleError) as caught:
        parse_manifest(content)
    assert all(word in str(caught.value) for word in ("image_size", "prediction", "licence"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_no_manifest_makes_the_reader_stumble(content: dict[str, Any], data: st.DataObject) -> None:
    """Any value anywhere: accepted, or one of the named errors."""
    changed = json.loads(json.dumps(content))
    node: Any = changed
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        inner = node[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            node[key] = data.draw(JSON)
            break
        node = inner
    try:
        manifest = parse_manifest(changed)
    except BundleError:
        return
    assert manifest.dimensions.image_size >= 1
