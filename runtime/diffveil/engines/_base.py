"""What an engine and a backend are, whatever executes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from diffveil.bundle import Bundle
from diffveil.programs import ProgramSpec

__all__ = ["Array", "Availability", "Backend", "BundleBackend", "Engine"]

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine, and why (not), in words for people."""

    ok: bool
    why: str

    def __bool__(self) -> bool:
        return self.ok


class Engine(Protocol):
    """One program made executable. Calls from several threads are allowed."""

    @property
    def program(self) -> ProgramSpec:
        """The program that this engine executes."""
        ...

    def run(self, **inputs: Array) -> dict[str, Array]:
        """Execute the program once.

        Args:
            **inputs: One array an input, shaped and typed as `program` declares.

        Returns:
            One array an output, in the interface's dtype. They belong to the caller: no later call
            writes to them.

        Raises:
            EngineError: Inputs differ from the declaration, or execution failed.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; calls after this raise `EngineError`."""
        ...


class Backend(Protocol):
    """A way of executing programs."""

    @property
    def name(self) -> str:
        """Name by which callers choose the backend."""
        ...

    def available(self) -> Availability:
        """Whether this machine can use the backend; cheap, never raises."""
        ...

    def load(self, bundle: Bundle, program: str) -> Engine:
        """Make `program` of `bundle` executable.

        Raises:
            BackendUnavailableError: The backend is not installed.
            BundleCorruptError: A file of the program differs from its hash.
            EngineError: The backend refuses the program.
        """
        ...


@runtime_checkable
class BundleBackend(Protocol):
    """What a backend has beside `Backend` if not every bundle runs on it."""

    def ready(self, bundle: Bundle) -> Availability:
        """Whether the bundle holds what the backend needs, such as engines; never raises."""
        ...
