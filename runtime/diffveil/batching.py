"""Program calls of bounded size: any number of rows through programs, a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffveil.errors import OptionError

__all__ = ["MAX_BATCH", "chunks", "in_chunks"]

MAX_BATCH = 32
"""Rows of one program call by default: beyond that memory grows and speed does not."""


def chunks(rows: int, max_batch: int, group: int = 1) -> list[slice]:
    """Cut rows into as few runs as fit, of about equal length.

    Args:
        rows: Number of rows, a multiple of `group`.
        max_batch: Most rows of a run.
        group: Neighbouring rows that must stay together.

    Returns:
        Slices in order, without gaps; none for no rows.

    Raises:
        OptionError: One group alone exceeds `max_batch`.
    """
    if group > max_batch:
        raise OptionError(
            f"{group} rows must go through a program together, expected at most {max_batch}"
        )
    groups, capacity = rows // group, max_batch // group
    runs = -(-groups // capacity)
    # Even runs: a last run of one row would cost almost as much as a full one.
    bounds = [group * (groups * i // runs) for i in range(runs + 1)] if runs else []
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def in_chunks(
    call: Callable[..., NDArray[np.float32]], max_batch: int, **inputs: NDArray[Any]
) -> NDArray[np.float32]:
    """Call a program whose rows do not depend on each other, a chunk at a time.

    Args:
        call: Takes the inputs by name, gives one output with as many rows.
        max_batch: Most rows of one call.
        inputs: Arrays with the same number of rows, at least one.

    Returns:
        The outputs, one below the other.
    """
    rows = len(next(iter(inputs.values())))
    outputs = [
        call(**{name: array[rows_of] for name, array in inputs.items()})
        for rows_of in chunks(rows, max_batch)
    ]
    return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)
