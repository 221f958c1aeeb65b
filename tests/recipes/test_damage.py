"""Faces spoiled on purpose: a spot changes, the rest does not, and the generator decides which."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "reference"))

from damage import spoiled


def test_a_spot_changes_and_the_rest_does_not() -> None:
    rng = np.random.default_rng(0)
    faces = torch.from_numpy(rng.uniform(-1, 1, (12, 3, 112, 112))).float()
    others = faces.roll(1, 0)
    result = spoiled(faces, others, np.random.default_rng(1))
    assert result.shape == faces.shape
    assert torch.isfinite(result).all()
    changed = (result != faces).any(1).flatten(1).float().mean(1)
    assert (changed > 0.005).all()
    assert (changed < 0.6).all()


def test_it_is_reproducible_and_never_the_same_twice() -> None:
    faces = torch.rand(4, 3, 112, 112)
    a = spoiled(faces, faces.roll(1, 0), np.random.default_rng(5))
    b = spoiled(faces, faces.roll(1, 0), np.random.default_rng(5))
    c = spoiled(faces, faces.roll(1, 0), np.random.default_rng(6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
