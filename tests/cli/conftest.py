"""The fakes of whole photos, for commands that need no real bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffveil import Protector
from fake_photos import TWO, ListedDetector, Pixels, smooth_photo
from fake_programs import fake_programs


@pytest.fixture
def protector(tmp_path: Path) -> Protector:
    detector = ListedDetector({(100, 160): TWO})
    return Protector(fake_programs(tmp_path / "bundle"), detector=detector)


@pytest.fixture
def group(rng: np.random.Generator) -> Pixels:
    return smooth_photo(rng, 100, 160)
