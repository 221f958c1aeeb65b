"""Loaded engines: made when first called, and replaced by the next backend's when one fails."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from diffveil.bundle import Bundle
from diffveil.engines._base import Array, Backend, Engine
from diffveil.engines._budget import MemoryBudget
from diffveil.engines._outputs import check_outputs
from diffveil.errors import EngineError
from diffveil.programs import check_inputs

__all__ = ["BackendWarning", "EnginePool", "Examine"]

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

Examine = Callable[[Engine], None]
"""Raises `EngineError` if a loaded engine does not compute what it should."""


class BackendWarning(RuntimeWarning):
    """A backend failed and another one runs in its place."""


@dataclass
class _Loaded:
    """An engine, how many calls are in it, and when the last one began."""

    engine: Engine
    users: int = 0
    used: int = 0


class EnginePool:
    """The engines of one bundle on the first backend of several that has not failed.

    A backend fails as a whole: when one of its engines cannot be loaded, does not stand the
    examination, raises, or returns what cannot be right, all of them are closed, a
    `BackendWarning` says so once, and the work is done again on the next backend. So no result
    ever comes from an engine that failed. Safe to share between threads.

    Args:
        bundle: The bundle.
        backends: Backends, best first, at least one.
        examine: Judges each engine when it is loaded.
        why: Why the first backend was chosen, in words.
        budget: Memory to keep within: engines that were not called lately are closed to make room.
    """

    def __init__(
        self,
        bundle: Bundle,
        backends: Sequence[Backend],
        *,
        examine: Callable[[Backend], Examine | None] | None = None,
        why: str = "",
        budget: MemoryBudget | None = None,
    ) -> None:
        self._bundle = bundle
        self._backends = tuple(backends)
        self._examine = examine
        self._why = why
        self._budget = budget
        self._lock = threading.Lock()  # of the fields below
        self._loading = threading.Lock()  # held while an engine is loaded
        self._at = 0
        self._loaded: dict[str, _Loaded] = {}
        self._clock = 0
        self._closed = False

    @property
    def backend(self) -> Backend:
        """What runs the programs now."""
        return self._backends[self._at]

    @property
    def remaining(self) -> tuple[Backend, ...]:
        """The backends that have not failed, best first."""
        return self._backends[self._at :]

    @property
    def why(self) -> str:
        """Why it is that backend, in words."""
        return self._why

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def engine(self, program: str) -> Engine:
        """The engine of a program, loaded if it is not yet.

        Raises:
            EngineError: No backend is left that loads it, or the pool is closed.
            BundleError: There is no such program, or its files are damaged.
        """

        def get() -> Engine:
            with self._lease(program) as engine:
                return engine

        return self.attempt(get)

    def call(self, program: str, **inputs: Array) -> dict[str, Array]:
        """Run a program and look at what it returned; see `Engine.run` and `check_outputs`.

        Raises:
            EngineError: The inputs are wrong, or the program failed on every backend.
            BundleError: There is no such program, or its files are damaged.
        """

        def run() -> dict[str, Array]:
            with self._lease(program) as engine:
                # Wrong inputs are the caller's fault, not the backend's: they raise `_CallerError`.
                try:
                    check_inputs(engine.program, inputs, self._bundle.dimensions)
                except EngineError as error:
                    raise _CallerError(error) from error
                outputs = engine.run(**inputs)
                check_outputs(engine.program, inputs, outputs)
                return outputs

        try:
            return self.attempt(run)
        except _CallerError as wrapped:
            raise wrapped.error from None

    @contextmanager
    def held(self, programs: Iterable[str]) -> Iterator[None]:
        """Load programs, and close none of them to make room while the block runs.

        A block that fails belongs into `attempt`, as a whole.

        Raises:
            EngineError: The backend cannot load one, or the pool is closed.
            BundleError: There is no such program, or its files are damaged.
        """
        with ExitStack() as stack:
            for program in programs:
                stack.enter_context(self._lease(program))
            yield

    def attempt(self, work: Callable[[], _T]) -> _T:
        """Do work that calls engines; again from its start whenever a backend fails.

        Raises:
            EngineError: It failed on the last backend.
        """
        while True:
            at = self._at
            try:
                return work()
            except EngineError as error:
                if not self._fall_back(at, error):
                    raise

    def close(self) -> None:
        """Free all engines; later calls raise `EngineError`."""
        with self._lock:
            self._closed = True
            loaded, self._loaded = self._loaded, {}
        for entry in loaded.values():
            entry.engine.close()

    @contextmanager
    def _lease(self, program: str) -> Iterator[Engine]:
        entry = self._enter(program) or self._load(program)
        try:
            yield entry.engine
        finally:
            with self._lock:
                entry.users -= 1

    def _enter(self, program: str) -> _Loaded | None:
        with self._lock:
            if self._closed:
                raise EngineError(f"the programs of bundle '{self._bundle.name}' are closed")
            entry = self._loaded.get(program)
            if entry is not None:
                self._clock += 1
                entry.users, entry.used = entry.users + 1, self._clock
            return entry

    def _load(self, program: str) -> _Loaded:
        with self._loading:
            entry = self._enter(program)
            if entry is not None:
                return entry
            at, backend = self._at, self.backend
            self._make_room(program)
            engine = backend.load(self._bundle, program)
            try:
                examine = self._examine(backend) if self._examine else None
                if examine is not None:
                    examine(engine)
                with self._lock:
                    if self._closed or at != self._at:
                        raise EngineError(
                            f"the programs of bundle '{self._bundle.name}' were closed"
                        )
                    self._clock += 1
                    entry = _Loaded(engine, 1, self._clock)
                    self._loaded[program] = entry
            except BaseException:
                engine.close()
                raise
            return entry

    def _make_room(self, program: str) -> None:
        """Close engines, the one least recently called first, until another one fits."""
        if self._budget is None:
            return
        closing = []
        with self._lock:
            idle = [name for name, entry in self._loaded.items() if not entry.users]
            for name in sorted(idle, key=lambda n: self._loaded[n].used):
                if self._budget.fits((*self._loaded, program)):
                    break
                closing.append(self._loaded.pop(name).engine)
        for engine in closing:
            _log.debug("closed program %s to make room", engine.program.name)
            engine.close()

    def _fall_back(self, at: int, error: EngineError) -> bool:
        """Whether work that began on backend number `at` may be tried again."""
        with self._lock:
            if self._closed or at != self._at:
                return not self._closed
            if at + 1 == len(self._backends):
                return False
            self._at += 1
            failed, following = self._backends[at].name, self.backend.name
            self._why = f"{failed} failed: {error}"
            loaded, self._loaded = self._loaded, {}
        for entry in loaded.values():
            with suppress(EngineError):  # a broken device may refuse even that
                entry.engine.close()
        _log.info("backend %s failed, %s follows", failed, following)
        warnings.warn(
            f"backend '{failed}' failed and '{following}' runs instead: {error}",
            BackendWarning,
            stacklevel=2,
        )
        return True


class _CallerError(Exception):
    """Carries an `EngineError` past the fall-back: another backend would raise it too."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(str(error))
        self.error = error
