"""Scores over embeddings and images, in plain NumPy."""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray

__all__ = ["Verification", "frechet_distance", "psnr"]

Array = NDArray[np.float32]


class Verification:
    """A recognizer's operating point on a set of original faces.

    Args:
        embeddings: Unit embeddings [N, E] of the original photos.
        people: Person of each photo, length N.
    """

    def __init__(self, embeddings: Array, people: list[str]) -> None:
        self.original = embeddings
        labels = np.unique(people, return_inverse=True)[1]
        self.same = labels[:, None] == labels[None, :]
        self.impostors = (embeddings @ embeddings.T)[np.triu(~self.same, 1)]

    def first(self, count: int) -> Verification:
        """The same operating point, for probes of the first photos alone."""
        part = copy.copy(self)
        part.original, part.same = self.original[:count], self.same[:count, :count]
        return part

    def threshold(self, far: float) -> float:
        """Cosine above which a share `far` of impostor pairs is accepted."""
        return float(np.quantile(self.impostors, 1 - far))

    def same_photo(self, probe: Array, far: float) -> float:
        """True accept rate of each protected photo against its own original."""
        return float(((probe * self.original).sum(1) > self.threshold(far)).mean())

    def other_photos(self, probe: Array, far: float) -> float:
        """True accept rate of each protected photo against other originals of the person."""
        others = self.same & ~np.eye(len(self.same), dtype=bool)
        return float(((probe @ self.original.T)[others] > self.threshold(far)).mean())

    def rank1(self, probe: Array) -> float:
        """Share of protected photos whose nearest other original is of the same person."""
        score = probe @ self.original.T
        np.fill_diagonal(score, -2)
        nearest = score.argmax(1)
        return float(self.same[np.arange(len(probe)), nearest].mean())


def frechet_distance(a: Array, b: Array) -> float:
    """Fréchet distance of two Gaussians fitted to features [N, E] and [M, E].

    Heusel et al. 2017, eq. 6. Tr √(Σa Σb) is taken as the sum of the singular values of Ya Ybᵀ for
    centred, scaled features Y, which is the same number without a matrix square root, and stable
    when there are fewer faces than dimensions. NaN for fewer than two faces.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = (x - mean_x) / np.sqrt(len(x) - 1), (y - mean_y) / np.sqrt(len(y) - 1)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(((mean_x - mean_y) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images."""
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
