"""How many floating-point operations a whole operation takes: its calls, counted, not computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffveil.bundle import Bundle
from diffveil.engines import Availability, Programs
from diffveil.engines._base import Array
from diffveil.operations import FaceOperations
from diffveil.programs import ALL_PROGRAMS, DYNAMIC_AXES, ProgramSpec

__all__ = ["counted_flops"]


def counted_flops(bundle: Bundle, call: Callable[[FaceOperations], object]) -> float | None:
    """Operations of all program calls that `call` makes, as the bundle states their costs.

    Args:
        bundle: The bundle.
        call: Given operations whose programs return noise at once.

    Returns:
        The sum, as counted at export; None where the bundle does not state a program's cost.
    """
    counter = _Counter()
    with Programs(bundle, counter) as programs:
        call(FaceOperations(programs))
    return None if counter.unknown else counter.flops


class _Counter:
    """A backend that computes nothing and counts what it would have computed."""

    name = "counting"

    def __init__(self) -> None:
        self.flops, self.unknown = 0.0, False

    def available(self) -> Availability:
        return Availability(True, "it computes nothing")

    def load(self, bundle: Bundle, program: str) -> _CountingEngine:
        return _CountingEngine(self, bundle, ALL_PROGRAMS[program])


class _CountingEngine:
    """Returns noise of the right shape: pictures of one colour would be refused."""

    def __init__(self, counter: _Counter, bundle: Bundle, program: ProgramSpec) -> None:
        self.program = program
        self._counter, self._bundle = counter, bundle
        self._rng = np.random.default_rng(0)

    def run(self, **inputs: Array) -> dict[str, Array]:
        sizes = {
            axis: size
            for tensor in self.program.inputs
            for axis, size in zip(tensor.axes, inputs[tensor.name].shape, strict=True)
            if axis in DYNAMIC_AXES
        }
        cost = self._bundle.program(self.program.name).cost
        if cost is None:
            self._counter.unknown = True
        else:
            self._counter.flops += cost.flops * max(sizes.values(), default=1)
        dimensions = self._bundle.dimensions
        return {
            tensor.name: self._rng.standard_normal(
                [sizes[a] if isinstance(a, str) else a for a in tensor.shape(dimensions)]
            ).astype(tensor.dtype)
            for tensor in self.program.outputs
        }

    def close(self) -> None:
        pass
