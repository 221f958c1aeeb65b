"""How a cost grows: laws fitted to measurements, and how far off they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Law", "fit", "slopes"]

_F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """A cost as a function of a size.

    Attributes:
        kind: `affine` (a + b·x) or `power` (c·xᵏ).
        first: a or c.
        second: b or k.
        residual: Root mean square of the relative errors.
        exponents: The power law's k with each measurement left out in turn, [N].
    """

    kind: str
    first: float
    second: float
    residual: float
    exponents: tuple[float, ...]

    def __call__(self, x: _F64) -> _F64:
        """Costs at sizes."""
        if self.kind == "affine":
            return self.first + self.second * x
        return np.asarray(self.first * x**self.second)

    def __str__(self) -> str:
        form = "{:.3g} + {:.3g}·x" if self.kind == "affine" else "{:.3g}·x^{:.2f}"
        return f"{form.format(self.first, self.second)}, off by {self.residual:.1%}"


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Law:
    """The law, affine or power, whose relative errors are smaller.

    Both have two parameters and are fitted by least squares: affine to relative errors, power in
    logarithms.

    Args:
        sizes: At least three different positive numbers.
        costs: Positive, as many.

    Raises:
        ValueError: There are fewer sizes, or a number is not positive.
    """
    x, y = np.asarray(sizes, np.float64), np.asarray(costs, np.float64)
    if len(np.unique(x)) < 3 or len(x) != len(y) or min(x.min(), y.min()) <= 0:
        raise ValueError(f"received sizes {sizes} and costs {costs}, expected ≥ 3, all positive")
    keep = ~np.eye(len(x), dtype=bool)
    exponents = tuple(_power(x[rest], y[rest])[1] for rest in keep)
    parameters = {"affine": _affine(x, y), "power": _power(x, y)}
    laws = []
    for kind, (first, second) in parameters.items():
        law = Law(kind, first, second, 0.0, exponents)
        residual = float(np.sqrt(np.mean((law(x) / y - 1) ** 2)))
        laws.append(Law(kind, first, second, residual, exponents))
    return min(laws, key=lambda law: law.residual)


def slopes(x: Sequence[float], y: Sequence[float]) -> _F64:
    """Slopes between all pairs of points; their median is Theil and Sen's estimate."""
    i, j = np.triu_indices(len(x), 1)
    x_, y_ = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.asarray((y_[j] - y_[i]) / (x_[j] - x_[i]))


def _affine(x: _F64, y: _F64) -> tuple[float, float]:
    design = np.stack([1 / y, x / y], axis=1)
    first, second = np.linalg.lstsq(design, np.ones(len(x)), rcond=None)[0].tolist()
    return first, second


def _power(x: _F64, y: _F64) -> tuple[float, float]:
    second, first = np.polyfit(np.log(x), np.log(y), 1).tolist()
    return float(np.exp(first)), second
