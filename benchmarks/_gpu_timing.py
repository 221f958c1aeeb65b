"""Calls timed until they have said enough."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["timed"]


def timed(
    call: Callable[[], object],
    seconds: float,
    wait: Callable[[], object] = lambda: None,
    *,
    fewest: int = 5,
    warm_up: int = 3,
) -> NDArray[np.float64]:
    """Time a call, after a few that nobody counts: they capture graphs and choose kernels.

    Args:
        call: What is timed.
        seconds: Time to spend.
        wait: Returns when the device is done; timed with the call.
        fewest: Fewest calls.
        warm_up: Calls before.

    Returns:
        Milliseconds of every call that counts.
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
    return np.asarray(spent, np.float64)
