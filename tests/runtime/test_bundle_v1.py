"""The compatibility promise: a bundle of version 1, written once, loads and computes for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffveil
from diffveil.bundle import MANIFEST_FILE, Bundle
from diffveil.engines import ONNXRuntimeCPU
from diffveil.errors import BundleError, BundleVersionError
from diffveil.golden import require_golden
from diffveil.programs import PROGRAMS

FOLDER = Path(__file__).parent.parent / "data" / "bundle-v1"

FINGERPRINT = "589a2e3af68a453e63e43354c78d2362acc6a2d82d8a5a9f4cdeb5bed829947d"
"""Keys are bound to it: a reader that computes another one has orphaned them."""


def test_it_loads_and_computes_what_it_always_did() -> None:
    bundle = Bundle.load(FOLDER)
    bundle.verify(full=True)
    assert json.loads((FOLDER / MANIFEST_FILE).read_text())["version"] == 1
    assert bundle.fingerprint == FINGERPRINT
    assert {name for name in bundle.manifest.programs if name in PROGRAMS} == {
        "encode", "decode", "embed", "expand", "denoise", "recognize", "guide"
    }  # fmt: skip
    require_golden(bundle, ONNXRuntimeCPU(threads=1))


def test_it_protects_and_recovers(rng: np.random.Generator) -> None:
    face = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    with diffveil.Protector.load(FOLDER) as protector:
        result = protector.anonymize(face, aligned=True, seed=1)
        assert result.key is not None
        recovered = protector.recover(result.image, result.key)
    assert np.asarray(recovered.image).shape == face.shape


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "copy"))


def _change(folder: Path, **fields: Any) -> None:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, **fields}))


def test_later_versions_are_refused_by_name(copy: Path) -> None:
    _change(copy, version=2)
    with pytest.raises(BundleVersionError, match="2"):
        Bundle.load(copy)


def test_unknown_fields_are_refused(copy: Path) -> None:
    _change(copy, colour="sepia")
    with pytest.raises(BundleError, match="colour"):
        Bundle.load(copy)
