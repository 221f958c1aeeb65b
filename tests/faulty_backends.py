"""Backends that fail in every way that a GPU's engines can, around one that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from diffveil.bundle import Bundle
from diffveil.engines import Array, Availability, Backend, Engine
from diffveil.errors import EngineError
from diffveil.programs import ProgramSpec

__all__ = ["FAULTS", "Fault", "FaultyBackend"]

Fault = Literal["load", "run", "nan", "infinite", "black", "wrong", "memory"]
FAULTS: tuple[Fault, ...] = ("load", "run", "nan", "infinite", "black", "wrong", "memory")


class FaultyBackend:
    """A working backend that fails at one program.

    Attributes:
        loaded: Programs that were loaded, in order.
        open: Engines that are not closed.
        calls: Programs that were run, in order.
    """

    def __init__(
        self, inner: Backend, name: str = "faulty", fault: Fault | None = None, at: str = "decode"
    ) -> None:
        self.inner, self.name, self.fault, self.at = inner, name, fault, at
        self.loaded: list[str] = []
        self.calls: list[str] = []
        self.open = 0
        self.after = 0  # calls of that program that still succeed

    def available(self) -> Availability:
        return Availability(True, "always")

    def load(self, bundle: Bundle, program: str) -> Engine:
        self.loaded.append(program)
        if self.fault == "load" and program == self.at:
            raise EngineError(f"the engine of program '{program}' was built for another GPU")
        self.open += 1
        return _FaultyEngine(self, self.inner.load(bundle, program))


class _FaultyEngine:
    def __init__(self, backend: FaultyBackend, inner: Engine) -> None:
        self._backend, self._inner = backend, inner

    @property
    def program(self) -> ProgramSpec:
        return self._inner.program

    def run(self, **inputs: Array) -> dict[str, Array]:
        backend, name = self._backend, self.program.name
        backend.calls.append(name)
        outputs = self._inner.run(**inputs)
        if name != backend.at or backend.fault in (None, "load"):
            return outputs
        if backend.after:
            backend.after -= 1
            return outputs
        if backend.fault == "run":
            raise EngineError(f"program '{name}' failed: an illegal memory access")
        if backend.fault == "memory":
            raise EngineError(f"program '{name}' failed: out of memory")
        return {output: _SPOIL[str(backend.fault)](array) for output, array in outputs.items()}

    def close(self) -> None:
        self._backend.open -= 1
        self._inner.close()


def _one(value: float) -> Callable[[Array], Array]:
    def spoil(array: Array) -> Array:
        spoilt = array.astype(np.float32)
        spoilt.flat[-1] = value
        return spoilt

    return spoil


_SPOIL: dict[str, Callable[[Array], Array]] = {
    "nan": _one(np.nan),
    "infinite": _one(-np.inf),
    "black": lambda array: np.full_like(array, -1.0),
    "wrong": lambda array: array * np.float32(1.01),
}
