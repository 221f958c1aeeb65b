"""Faces spoiled on purpose: what a judge of drawn faces is to like less than the same face whole.

After Li et al., "Face X-ray" (arXiv 1912.13458), who blend faces to learn what blending looks like;
here the blends are of the kind that a diffusion model leaves: an eye under skin, a nose doubled,
features out of their place, haze. Axes: B faces, S = 112 pixels of ArcFace's framing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

_SIZE = 112
_PLACES = ((38.3, 51.7), (73.5, 51.5), (56.0, 71.7), (56.0, 92.3))  # ArcFace: eyes, nose, mouth
_ROWS, _COLUMNS = torch.meshgrid(torch.arange(112.0), torch.arange(112.0), indexing="ij")


def spoiled(faces: torch.Tensor, others: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Faces [B, 3, 112, 112] with one or two spots spoiled, each its own way.

    Args:
        faces: Whole faces.
        others: As many other faces, parts of which show through.
        rng: Decides where and how.
    """
    result = []
    for face, other in zip(faces, others, strict=True):
        for _ in range(int(rng.integers(1, 3))):
            face = _spot(face, other, rng)
        result.append(face)
    return torch.stack(result)


def _spot(face: torch.Tensor, other: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    mask = _ellipse(rng)
    kind = int(rng.integers(7))
    if kind == 0:
        new = _blurred(face, rng.uniform(2.5, 6))
    elif kind == 1:  # skin from above or below, across an eye or a mouth
        shift = int(rng.uniform(12, 22) * rng.choice([-1, 1])), int(rng.normal(0, 5))
        new = _blurred(torch.roll(face, shift, (1, 2)), rng.uniform(0.5, 3))
    elif kind == 2:
        new = other
    elif kind == 3:
        new = _warped(face, rng)
    elif kind == 4:  # the same feature twice
        shift = int(rng.normal(0, 6)), int(rng.normal(0, 6))
        new, mask = torch.roll(face, shift, (1, 2)), mask * rng.uniform(0.4, 0.8)
    elif kind == 5:  # haze
        tint = torch.from_numpy(rng.normal(0, 0.25, (3, 1, 1))).float()
        new = (face.mean((1, 2), keepdim=True) + tint).expand_as(face)
        mask = mask * rng.uniform(0.4, 0.9)
    else:
        new, mask = face.flip(2), mask * rng.uniform(0.5, 1)
    return face + mask * (new - face)


def _ellipse(rng: np.random.Generator) -> torch.Tensor:
    """A soft spot [1, S, S], mostly about an eye, the nose or the mouth."""
    which = int(rng.integers(len(_PLACES) + 1))
    if which < len(_PLACES):
        x, y = _PLACES[which]
    else:
        x, y = rng.uniform(30, 82), rng.uniform(40, 100)
    x, y = x + rng.normal(0, 3), y + rng.normal(0, 3)
    wide, high, soft = rng.uniform(8, 17), rng.uniform(6, 13), rng.uniform(0.2, 0.6)
    radius = torch.sqrt(((_COLUMNS - x) / wide) ** 2 + ((_ROWS - y) / high) ** 2)
    return ((1 + soft - radius) / (2 * soft)).clamp(0, 1)[None]


def _blurred(face: torch.Tensor, sigma: float) -> torch.Tensor:
    reach = int(np.ceil(2 * sigma))
    weights = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = F.pad(face[None], (reach, reach, reach, reach), mode="reflect")
    rows = F.conv2d(padded, weights, groups=3)
    return F.conv2d(rows, weights.transpose(2, 3), groups=3)[0]


def _warped(face: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Moved about by some pixels, neighbours alike."""
    coarse = int(rng.integers(5, 10))
    moves = torch.from_numpy(rng.normal(0, rng.uniform(3, 7), (1, 2, coarse, coarse))).float()
    away = F.interpolate(moves, _SIZE, mode="bicubic", align_corners=True)[0]
    half = (_SIZE - 1) / 2
    grid = torch.stack([(_COLUMNS + away[0]) / half - 1, (_ROWS + away[1]) / half - 1], -1)
    return F.grid_sample(face[None], grid[None], padding_mode="border", align_corners=True)[0]
