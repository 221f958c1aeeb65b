"""Choosing a backend, with the reasons that `diffveil doctor` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffveil.bundle import Bundle
from diffveil.engines._base import Backend
from diffveil.engines.onnxrt import ONNXRuntimeCPU
from diffveil.errors import BackendUnavailableError, OptionError

__all__ = ["BACKENDS", "Reason", "Selection", "select_backend"]

BACKENDS: dict[str, Callable[[int | None], Backend]] = {"cpu": ONNXRuntimeCPU}
"""Constructors by name, best first; each takes the number of CPU threads or None."""


@dataclass(frozen=True)
class Reason:
    """What was found out about one backend.

    Attributes:
        name: The backend.
        ok: Whether it can be used.
        why: In words: its version, or what is missing and how to install it.
        chosen: Whether it is the one selected.
    """

    name: str
    ok: bool
    why: str
    chosen: bool = False


@dataclass(frozen=True)
class Selection:
    """A backend and the reasons for choosing it; `backend` is None when none can be used."""

    backend: Backend | None
    reasons: tuple[Reason, ...]

    def require(self) -> Backend:
        """The backend.

        Raises:
            BackendUnavailableError: None can be used; the message says why for each.
        """
        if self.backend is None:
            found = "; ".join(f"{r.name}: {r.why}" for r in self.reasons)
            raise BackendUnavailableError(f"no backend can run on this machine ({found})")
        return self.backend


def select_backend(
    name: str | None = None, bundle: Bundle | None = None, *, threads: int | None = None
) -> Selection:
    """Look at backends, best first, and take the first that can be used.

    Args:
        name: Consider only this backend.
        bundle: The bundle that is to be run; backends that need engines built into it are
            considered only when it has them.
        threads: CPU threads of a call; by default the CPUs that this process may use.

    Raises:
        OptionError: There is no backend of that name.
    """
    # `bundle` decides nothing yet: ONNX Runtime runs every bundle.
    if name is not None and name not in BACKENDS:
        raise OptionError(f"backend: received '{name}', expected one of {', '.join(BACKENDS)}")
    chosen: Backend | None = None
    reasons: list[Reason] = []
    for key, construct in BACKENDS.items():
        if name not in (None, key):
            continue
        backend = construct(threads)
        state = backend.available()
        take = state.ok and chosen is None
        if take:
            chosen = backend
        reasons.append(Reason(key, state.ok, state.why, take))
    return Selection(chosen, tuple(reasons))
