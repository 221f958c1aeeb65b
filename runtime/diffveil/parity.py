"""How far an output of a program is from the reference, as data, and what is still the same.

The exporter records these numbers and decides by them; `diffveil verify` and backends are held
against the same numbers on other machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffveil._manifest import ParityEntry

__all__ = ["TOLERANCES", "OutputParity", "Tolerance", "compare", "describe"]


@dataclass(frozen=True)
class Tolerance:
    """What still counts as the same result.

    Attributes:
        max_rel: Largest difference of a number, relative to the largest of the reference.
        min_cosine: Smallest cosine of output and reference, as vectors.
        max_norm: Largest relative difference of their norms.
    """

    max_rel: float
    min_cosine: float
    max_norm: float


TOLERANCES = MappingProxyType(
    {
        # Rounding errors of a deep network grow about with the root of the operations behind a
        # value, here 10⁵ to 10⁶, and both sides round in different orders.
        "float32": Tolerance(1000 * float(np.finfo(np.float32).eps), 1 - 1e-6, 1e-3),
        # With a unit roundoff u of 2⁻¹¹ a vector is off by some 20 to 30 u (measured: cosine
        # ≥ 0.9998 for the gradient of a full-size model); single numbers by more.
        "float16": Tolerance(0.125, 0.999, 0.01),
        # Eight times float16's roundoff, of which the cosine sees the square.
        "bfloat16": Tolerance(0.5, 0.99, 0.08),
    }
)
"""By the precision that a program computes in."""


@dataclass(frozen=True)
class OutputParity:
    """How far one output of one call is from the reference.

    Attributes:
        program: The program.
        output: The output.
        batch: Size of the dynamic axis.
        max_abs: Largest absolute difference.
        max_rel: `max_abs` over the largest absolute reference value.
        psnr: Peak signal to noise ratio in dB; None where both agree bit for bit.
        expected_dtype: Of the reference.
        actual_dtype: Of the output.
        expected_shape: Of the reference.
        actual_shape: Of the output.
        cosine: Cosine of the two as vectors, the smallest of all rows of the batch.
        norm_ratio: Norm of the output over that of the reference, the farthest from one of all
            rows.
        precision: What the program computes in; it decides the tolerance.
    """

    program: str
    output: str
    batch: int
    max_abs: float
    max_rel: float
    psnr: float | None
    expected_dtype: str
    actual_dtype: str
    expected_shape: tuple[int, ...]
    actual_shape: tuple[int, ...]
    cosine: float = 1.0
    norm_ratio: float = 1.0
    precision: str = "float32"

    def __bool__(self) -> bool:
        """Whether dtype and shape agree and the difference is within tolerance."""
        t = TOLERANCES[self.precision]
        return (
            self.expected_dtype == self.actual_dtype
            and self.expected_shape == self.actual_shape
            and self.max_rel <= t.max_rel
            and self.cosine >= t.min_cosine
            and abs(self.norm_ratio - 1) <= t.max_norm
        )

    def entry(self) -> ParityEntry:
        """What the manifest records."""
        return ParityEntry(
            self.output,
            self.batch,
            self.max_abs,
            self.max_rel,
            self.psnr,
            self.cosine,
            self.norm_ratio,
        )


def compare(
    program: str,
    output: str,
    batch: int,
    expected: NDArray[np.floating[Any]],
    actual: NDArray[np.floating[Any]],
    precision: str = "float32",
) -> OutputParity:
    """Compare two arrays [batch, …]; what is not finite counts as infinitely far.

    Args:
        program: The program that was run.
        output: Name of its output.
        batch: Size of its dynamic axis.
        expected: The reference.
        actual: What the program returned.
        precision: What the program computes in.
    """
    max_abs = max_rel = float("inf")
    psnr: float | None = float("-inf")
    cosine, norm_ratio = -1.0, 0.0
    if expected.shape == actual.shape:
        reference, other = expected.astype(np.float64), actual.astype(np.float64)
        if np.isfinite(other).all() and np.isfinite(reference).all():
            difference = np.abs(other - reference)
            peak = float(np.abs(reference).max())
            max_abs = float(difference.max())
            max_rel = max_abs / peak if peak > 0 else (0.0 if max_abs == 0 else float("inf"))
            mse = float((difference**2).mean())
            if mse == 0:
                psnr = None
            elif peak > 0:
                psnr = float(10 * np.log10(peak**2 / mse))
            cosine, norm_ratio = _directions(reference, other)
    return OutputParity(
        program=program,
        output=output,
        batch=batch,
        max_abs=max_abs,
        max_rel=max_rel,
        psnr=psnr,
        expected_dtype=str(expected.dtype),
        actual_dtype=str(actual.dtype),
        expected_shape=expected.shape,
        actual_shape=actual.shape,
        cosine=cosine,
        norm_ratio=norm_ratio,
        precision=precision,
    )


def _directions(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> tuple[float, float]:
    """Worst cosine and norm ratio of the rows; a row of zeros must stay one."""
    rows, others = (a.reshape(len(a), -1) for a in (expected, actual))
    cosines, ratios = [1.0], [1.0]
    for row, other in zip(rows, others, strict=True):
        lengths = float(np.linalg.norm(row)), float(np.linalg.norm(other))
        if lengths[0] == 0:
            cosines.append(1.0 if lengths[1] == 0 else 0.0)
            continue
        ratios.append(lengths[1] / lengths[0])
        cosines.append(float(row @ other) / (lengths[0] * lengths[1]) if lengths[1] else 0.0)
    return min(cosines), max(ratios, key=lambda ratio: abs(ratio - 1))


def describe(rows: Sequence[OutputParity]) -> str:
    """In words, one after the other: what is wrong with the rows that are not within tolerance."""
    return "; ".join(
        f"{r.program}.{r.output} (batch {r.batch}, {r.precision}): relative difference "
        f"{r.max_rel:.2e}, cosine {r.cosine:.6f}, norm ratio {r.norm_ratio:.4f}, "
        f"received {r.actual_dtype} {list(r.actual_shape)}, "
        f"expected {r.expected_dtype} {list(r.expected_shape)}"
        for r in rows
        if not r
    )
