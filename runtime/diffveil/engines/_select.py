"""Choosing a backend, with the reasons that `diffveil doctor` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffveil.bundle import Bundle
from diffveil.engines._base import Availability, Backend, BundleBackend
from diffveil.engines.onnxrt import ONNXRuntimeCPU
from diffveil.engines.onnxrt_cuda import ONNXRuntimeCUDA
from diffveil.engines.tensorrt import TensorRT
from diffveil.errors import BackendUnavailableError, OptionError

__all__ = ["AUTO", "BACKENDS", "REFERENCE", "Reason", "Selection", "select_backend"]

AUTO = "auto"
"""Name for: the first backend, in the expected order of speed, that can be used."""

REFERENCE = "cpu"
"""The backend that the exporter held against PyTorch; all others are held against golden data."""

BACKENDS: dict[str, Callable[[int | None], Backend]] = {
    "tensorrt": lambda threads: TensorRT("tensorrt"),
    "tensorrt-rtx": lambda threads: TensorRT("tensorrt-rtx"),
    "onnxruntime-cuda": ONNXRuntimeCUDA,
    "cpu": ONNXRuntimeCPU,
}
"""Constructors by name, in the expected order of speed.

Each takes the number of CPU threads or None.
"""

_FIRST = "the first that can run here, in the expected order of speed"

Judge = Callable[[Backend], Availability]
"""Says whether a backend that can run computes what it should; see `diffveil.golden.judge_for`."""


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
    """A backend and the reasons for choosing it.

    Attributes:
        backend: The first that can be used; None when none can.
        reasons: What was found out about each, in the expected order of speed.
        others: What else can be used, in that order: what to fall back on.
    """

    backend: Backend | None
    reasons: tuple[Reason, ...]
    others: tuple[Backend, ...] = ()

    def require(self) -> Backend:
        """The backend.

        Raises:
            BackendUnavailableError: None can be used; the message says why for each.
        """
        if self.backend is None:
            found = "; ".join(f"{r.name}: {r.why}" for r in self.reasons)
            raise BackendUnavailableError(f"no backend can run on this machine ({found})")
        return self.backend

    @property
    def why(self) -> str:
        """Why it is that backend, in words: what kept those before it from being chosen."""
        if len(self.reasons) == 1:
            return "it was named"
        passed = [f"{r.name} cannot: {r.why}" for r in self.reasons[: self._position]]
        return "; ".join([_FIRST, *passed])

    @property
    def _position(self) -> int:
        return next((i for i, r in enumerate(self.reasons) if r.chosen), len(self.reasons))


def select_backend(
    name: str | None = None,
    bundle: Bundle | None = None,
    *,
    threads: int | None = None,
    judge: Judge | None = None,
) -> Selection:
    """Look at backends in the expected order of speed, and take the first that can be used.

    Args:
        name: Consider only this backend; None or `AUTO`: all.
        bundle: The bundle that is to be run; backends that need engines built into it are
            considered only when it has them.
        threads: CPU threads of a call; by default the CPUs that this process may use.
        judge: Asked about every backend that can be used; by default none is looked at further.

    Raises:
        OptionError: There is no backend of that name.
    """
    if name is not None and name != AUTO and name not in BACKENDS:
        raise OptionError(
            f"backend: received '{name}', expected one of {', '.join((AUTO, *BACKENDS))}"
        )
    named = name not in (None, AUTO)
    usable: list[Backend] = []
    found: list[tuple[str, Availability]] = []
    for key, construct in BACKENDS.items():
        if named and key != name:
            continue
        backend = construct(threads)
        state = _state(backend, bundle, named)
        if state and judge is not None:
            verdict = judge(backend)
            state = Availability(verdict.ok, f"{state.why}; {verdict.why}")
        if state:
            usable.append(backend)
        found.append((key, state))
    return Selection(usable[0] if usable else None, _reasons(found), tuple(usable[1:]))


def _state(backend: Backend, bundle: Bundle | None, named: bool) -> Availability:
    state = backend.available()
    if not state or bundle is None:
        return state
    if isinstance(backend, BundleBackend):
        ready = backend.ready(bundle)
        if not ready:
            return ready
        state = Availability(True, f"{state.why}, {ready.why}" if ready.why else state.why)
    if backend.name != REFERENCE and not named and not bundle.has_golden:
        return Availability(
            False,
            f"bundle '{bundle.name}' carries no golden data to hold it against; name the backend "
            "to use it all the same",
        )
    return state


def _reasons(found: Sequence[tuple[str, Availability]]) -> tuple[Reason, ...]:
    first = next((name for name, state in found if state), None)
    return tuple(Reason(name, state.ok, state.why, name == first) for name, state in found)
