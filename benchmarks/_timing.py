"""Time taken in turns: what is compared runs by turns in one session, and each turn gives a ratio.

Whatever else a machine does then falls on all alike. Medians count, with the spread beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Times", "Way", "clock", "in_turns", "ratios", "resident_bytes"]

Way: TypeAlias = Callable[[], float]
"""Does something once and returns the seconds that it took."""

Times: TypeAlias = NDArray[np.float64]
"""Seconds of each turn, [T]."""

_Name = TypeVar("_Name")


def clock(call: Callable[[], object]) -> Way:
    """The way that calls a function here and looks at the clock before and after."""

    def way() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return way


def in_turns(
    ways: Mapping[_Name, Way], seconds: float, *, fewest: int = 5, warm_up: int = 1
) -> dict[_Name, Times]:
    """Let ways take turns, in an order that rotates, for about so many seconds.

    Args:
        ways: By name.
        seconds: Time to spend after warming up.
        fewest: Turns that are taken however long they last.
        warm_up: Turns before those that count.

    Returns:
        Seconds of every turn, by name; turn t of one belongs to turn t of all others.
    """
    names = list(ways)
    for _ in range(warm_up):
        for name in names:
            ways[name]()
    spent: dict[_Name, list[float]] = {name: [] for name in names}
    until, turn = time.perf_counter() + seconds, 0
    while turn < fewest or time.perf_counter() < until:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            spent[name].append(ways[name]())
        turn += 1
    return {name: np.asarray(values) for name, values in spent.items()}


def ratios(times: Mapping[str, Times], base: str) -> dict[str, Times]:
    """Every way's seconds over those of `base` in the same turn, by name, `base` left out."""
    return {name: values / times[base] for name, values in times.items() if name != base}


def resident_bytes() -> int | None:
    """Bytes of this process that are in memory; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return 1024 * int(kib)
