"""Calls timed until they have said enough: percentiles, rates, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["Timing", "timed"]

_FEWEST = 5
_WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call.

    Attributes:
        p50_ms: Median.
        p90_ms: Nine of ten are shorter.
        calls: Number of calls.
    """

    p50_ms: float
    p90_ms: float
    calls: int

    def record(self, rows: int, flops: float | None = None, peak: float | None = None) -> Any:
        """Fields of a row: times, faces a second, and rates where operations are known.

        Args:
            rows: Faces of a call.
            flops: Operations of a call.
            peak: Operations a second that the device was measured to reach.
        """
        seconds = self.p50_ms / 1000
        row: dict[str, Any] = {**asdict(self), "per_second": rows / seconds}
        if flops is not None:
            row["tflops"] = flops / seconds / 1e12
            if peak:
                row["share"] = flops / seconds / peak
        return row


def timed(
    call: Callable[[], object],
    seconds: float,
    wait: Callable[[], object] = lambda: None,
    *,
    fewest: int = _FEWEST,
    warm_up: int = _WARM_UP,
) -> Timing:
    """Time a call, after a few that nobody counts: they capture graphs and choose kernels.

    Args:
        call: What is timed.
        seconds: Time to spend.
        wait: Returns when the device is done; timed with the call.
        fewest: Fewest calls.
        warm_up: Calls before.
    """
    for _ in range(warm_up):
        call()
    wait()
    spent: list[float] = []
    until = time.perf_counter() + seconds
    while len(spent) < fewest or time.perf_counter() < until:
        started = time.perf_counter()
        call()
        wait()
        spent.append(1000 * (time.perf_counter() - started))
    p50, p90 = np.quantile(spent, (0.5, 0.9)).tolist()
    return Timing(p50, p90, len(spent))
