"""Fixtures of whole photos: two photos, a detector that knows their faces, a protector of fakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffveil import Protector
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
