"""How much memory programs need, by the manifest's counts, and how many faces fit into some."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from diffveil.bundle import Bundle
from diffveil.errors import OptionError
from diffveil.programs import LOOP_PROGRAMS

__all__ = ["MemoryBudget", "parse_memory"]

_PEAK_SHARE = 0.25
"""Share of the bytes that a program writes which it holds at once, at most.

By liveness over the graphs of the embedded bundle it is 0.05 to 0.23; deeper programs hold less.
"""

_UNITS = {"": 1, "K": 10, "M": 20, "G": 30}
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)\s*([KMG]?)(?:iB|B)?", re.IGNORECASE)


def parse_memory(size: int | str) -> int:
    """Bytes of a size: a number of them, or text such as `"1.5GiB"`, `"800M"` (powers of 1024).

    Raises:
        OptionError: It is no such size, or not positive.
    """
    number: float
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        if match is None:
            raise OptionError(f"max_memory: received {size!r}, expected such as '1.5GiB' or '800M'")
        unit = _UNITS[match[2].upper()]
        number = float(match[1]) * (1 if unit == 1 else 1 << unit)
    else:
        number = size
    if isinstance(size, bool) or number < 1:
        raise OptionError(f"max_memory: received {size!r}, expected at least one byte")
    return int(number)


@dataclass(frozen=True)
class MemoryBudget:
    """Memory for the programs of one bundle, for one call at a time.

    It bounds an estimate: weights in the type they are computed with, and the tensors that are
    alive at once. What libraries take for themselves comes on top.

    Attributes:
        bundle: The bundle.
        limit: Bytes.
        rows: Most rows of one call.
    """

    bundle: Bundle
    limit: int
    rows: int

    @classmethod
    def plan(cls, bundle: Bundle, limit: int, most: int) -> MemoryBudget:
        """The budget with as many rows a call as fit.

        Programs that take turns in a sampling loop must fit together; all others one by one.

        Args:
            bundle: The bundle.
            limit: Bytes.
            most: More rows than this are never wanted.

        Raises:
            OptionError: Not even one row fits, or the bundle does not state what programs cost.
        """
        without = [n for n, p in bundle.manifest.programs.items() if p.cost is None]
        if without:
            raise OptionError(
                f"max_memory: bundle '{bundle.name}' does not state the cost of "
                f"{', '.join(without)}; export it again with this diffveil"
            )
        groups = _groups(bundle)
        for rows in range(most, 0, -1):
            budget = cls(bundle, limit, rows)
            if all(budget.need(group) <= limit for group in groups):
                return budget
        largest = max(groups, key=cls(bundle, limit, 1).need)
        raise OptionError(
            f"max_memory: received {limit} bytes, but {' and '.join(largest)} of bundle "
            f"'{bundle.name}' need about {cls(bundle, limit, 1).need(largest)} for one face"
        )

    def need(self, programs: Iterable[str]) -> int:
        """Bytes of loaded programs of which one runs at a time, with `rows` rows."""
        costs = [self.bundle.program(name).cost for name in programs]
        known = [cost for cost in costs if cost is not None]
        working = max((cost.activation_bytes for cost in known), default=0)
        return sum(cost.weight_bytes for cost in known) + int(_PEAK_SHARE * working * self.rows)

    def fits(self, programs: Iterable[str]) -> bool:
        """Whether these programs may be loaded at the same time."""
        return self.need(programs) <= self.limit


def _groups(bundle: Bundle) -> list[tuple[str, ...]]:
    """Programs that must be loaded at the same time: each, and those that take turns."""
    have = bundle.manifest.programs
    denoisers = [name for name in ("denoise", "denoise_few") if name in have]
    guides = [name for name in ("guide", "guide_latent") if name in have]
    small = tuple(name for name in LOOP_PROGRAMS if name in have)
    return [*((name,) for name in have), *(pair + small for pair in product(denoisers, guides))]
