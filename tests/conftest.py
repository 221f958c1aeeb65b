"""Fixtures shared by all tests."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

from diffveil.bundle import Bundle

_ROOT = Path(__file__).parent.parent


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of the test's own, so that no test depends on another having run."""
    return np.random.default_rng(20)


def _sources_digest() -> str:
    """Hash of everything that decides what the tiny bundle's bytes are."""
    digest = hashlib.sha256()
    files = [
        *sorted((_ROOT / "export" / "diffveil_export").rglob("*.py")),
        *(_ROOT / "runtime" / "diffveil" / f"{n}.py" for n in ("_manifest", "bundle", "programs")),
        _ROOT / "tests" / "tiny_models.py",
    ]
    for file in files:
        digest.update(file.read_bytes())
    for package in ("torch", "onnx-ir", "onnxscript", "diffusers"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def tiny_bundle_path(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bundle exported from a tiny random model. Read only: copy before changing.

    Exporting takes half a minute, so the folder is kept between runs until a source changes.
    """
    if hasattr(pytestconfig, "cache") and pytestconfig.cache is not None:
        base = pytestconfig.cache.mkdir("tiny-bundle")
    else:
        base = tmp_path_factory.mktemp("tiny-bundle")
    folder = base / _sources_digest()
    if not folder.exists():
        from diffveil.errors import OptionError
        from diffveil_export.exporter import export_bundle
        from tiny_models import tiny_components

        try:
            export_bundle(tiny_components(), folder)
        except OptionError:
            assert folder.exists()  # another test run was quicker
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundle_path: Path) -> Bundle:
    """A bundle of 32-pixel crops and 8×4×4 latents with random weights, stored in int8."""
    return Bundle.load(tiny_bundle_path)
