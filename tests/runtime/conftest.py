"""Fixtures of whole photos: two photos, a detector that knows their faces, a protector of fakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffveil import Protector
from diffveil.bundle import Bundle
from fake_photos import ONE, TWO, ListedDetector, Pixels, smooth_photo
from fake_programs import fake_programs


@pytest.fixture
def detector() -> ListedDetector:
    return ListedDetector({(100, 160): TWO, (90, 110): ONE})


@pytest.fixture
def protector(tmp_path: Path, detector: ListedDetector) -> Protector:
    return Protector(fake_programs(tmp_path / "bundle"), detector=detector)


@pytest.fixture
def group(rng: np.random.Generator) -> Pixels:
    return smooth_photo(rng, 100, 160)


@pytest.fixture
def portrait(rng: np.random.Generator) -> Pixels:
    return smooth_photo(rng, 90, 110)


@pytest.fixture(scope="session")
def engines(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with program `step` and engines of every program. Read only."""
    from diffveil_export.step import fuse_step
    from fake_trt_runtime import write_engines

    folder = tmp_path_factory.mktemp("engines") / "bundle"
    bundle = fuse_step(Bundle.load(tiny_bundle_path), folder)
    write_engines(bundle)
    return bundle
