"""Backends that stand in for other machines' arithmetic, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort

from diffveil.bundle import Bundle
from diffveil.engines import Array, Engine, ONNXRuntimeCPU
from diffveil.programs import ProgramSpec

__all__ = ["Rounded", "Unoptimised", "to_float16", "to_tf32"]

Rounding: TypeAlias = Callable[[Array], Array]


def to_float16(array: Array) -> Array:
    """The nearest numbers that float16 has, float32."""
    return array.astype(np.float16).astype(np.float32)


def to_tf32(array: Array) -> Array:
    """The nearest numbers with ten bits of fraction, in float32's range."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded: Array = ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)
    return rounded


class Rounded(ONNXRuntimeCPU):
    """Rounds what every program takes and returns.

    Args:
        rounding: Rounds an array.
        threads: CPU threads of a call.
    """

    def __init__(self, rounding: Rounding, threads: int | None = None) -> None:
        super().__init__(threads)
        self._rounding = rounding

    def load(self, bundle: Bundle, program: str) -> Engine:
        """An engine of the CPU that rounds."""
        return _RoundedEngine(super().load(bundle, program), self._rounding)


class _RoundedEngine:
    def __init__(self, inner: Engine, rounding: Rounding) -> None:
        self._inner, self._rounding = inner, rounding

    @property
    def program(self) -> ProgramSpec:
        return self._inner.program

    def run(self, **inputs: Array) -> dict[str, Array]:
        rounded = {n: self._rounding(a) if a.dtype == np.float32 else a for n, a in inputs.items()}
        return {n: self._rounding(a) for n, a in self._inner.run(**rounded).items()}

    def close(self) -> None:
        self._inner.close()


class Unoptimised(ONNXRuntimeCPU):
    """Runs graphs as they are written, so that sums run in another order."""

    def options(self) -> Any:
        """The backend's, without optimisation."""
        options = super().options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return options
