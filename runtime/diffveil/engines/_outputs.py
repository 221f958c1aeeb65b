"""What a program returned, looked at once: numbers that are none, and pictures that are none.

A kernel that fails in float16, or an engine that reads the wrong memory, mostly leaves NaN or one
colour behind. One pass over the outputs, without a copy of them, finds both.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffveil.engines._base import Array
from diffveil.errors import EngineError
from diffveil.programs import ProgramSpec

__all__ = ["check_outputs"]

_FLAT = 1e-4
"""A picture that spans less than this of its range of 2 has one colour: 1/40 of an 8-bit step."""


def check_outputs(
    spec: ProgramSpec, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
) -> None:
    """Refuse outputs that cannot be right, whatever the program was asked.

    Args:
        spec: The program.
        inputs: What it was given.
        outputs: What it returned, float32.

    Raises:
        EngineError: A number is NaN or infinite; or an image has one colour although what it was
            drawn from is not constant. The message names the outputs.
    """
    problems = []
    for name, array in outputs.items():
        # The sum is finite only if every number is: one pass, and no array of truth values. It
        # can also overflow, so then every number is asked.
        with np.errstate(all="ignore"):
            total = np.sum(array)
        if not np.isfinite(total) and not np.isfinite(array).all():
            problems.append(f"{name} holds NaN or infinite numbers")
    if not problems and "image" in outputs:
        flat = _constant(outputs["image"])
        if flat.any():
            varied = [~_constant(array) for array in inputs.values() if array.ndim > 1]
            wrong = np.flatnonzero(flat & np.logical_or.reduce(varied)) if varied else ()
            if len(wrong):
                problems.append(f"image has one colour in rows {list(map(int, wrong))}")
    if problems:
        raise EngineError(
            f"program '{spec.name}' went wrong: {'; '.join(problems)}; if it computes in float16, "
            "use a bundle or backend of higher precision"
        )


def _constant(array: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Rows [B] of an array [B, channels, …] in which every channel is all but constant."""
    spread = np.ptp(array.reshape(*array.shape[:2], -1), axis=-1)
    return np.asarray((spread < _FLAT).all(axis=-1), dtype=np.bool_)
