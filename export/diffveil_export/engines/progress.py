"""How far a build is: nested phases of steps as one number, and Ctrl-C while native code runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["SCALE", "BuildProgress", "cancel_on_interrupt"]

SCALE = 1000
"""`total` that the callback is given."""


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """What a builder's progress monitor reports, for a callback `progress(done, total)`.

    A phase is a share of one step of its parent. Builders name phases and divide them as they like,
    so the number is a guess that only grows.

    Args:
        report: The callback, or None.

    Attributes:
        cancelled: Set it to make the builder give up at its next step.
    """

    def __init__(self, report: Callable[[int, int], None] | None = None) -> None:
        self._report = report
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()  # builders may call from threads of their own
        self._shown = 0.0
        self.cancelled = False

    @property
    def fraction(self) -> float:
        """Share that is done, 0…1."""
        return self._shown

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(1, steps))

    def step(self, name: str, index: int) -> bool:
        """Step `index` of a phase is done; returns whether the builder should go on."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = min(index + 1, phase.steps)
            self._shown = max(self._shown, self._measure())
            done = round(self._shown * SCALE)
        if self._report is not None and not self.cancelled:
            self._report(done, SCALE)
        return not self.cancelled

    def finish(self, name: str) -> None:
        """A phase ends; the outermost one without a last step of its own."""
        with self._lock:
            phase = self._phases.pop(name, None)
            ended = phase is not None and phase.parent is None
            if ended and not self.cancelled:
                self._shown = 1.0
        if ended and self._report is not None and not self.cancelled:
            self._report(SCALE, SCALE)

    def _measure(self) -> float:
        within: dict[str | None, float] = {}
        # Children come after their parents; from the innermost outwards each is a share of a step.
        for name, phase in reversed(self._phases.items()):
            share = min((phase.done + within.get(name, 0.0)) / phase.steps, 1.0)
            within[phase.parent] = max(within.get(phase.parent, 0.0), share)
        return within.get(None, 0.0)


@contextmanager
def cancel_on_interrupt(progress: BuildProgress) -> Iterator[None]:
    """Turn Ctrl-C into `progress.cancelled`, then into KeyboardInterrupt when the block ends.

    An exception raised inside a builder's callback would be swallowed by its bindings. Outside the
    main thread, where Python delivers no signals, this does nothing.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed within the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def handle(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = progress.cancelled = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception:
        # A cancelled builder reports a failure: that is not what the person should read.
        if not interrupted:
            raise
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
    if interrupted:
        raise KeyboardInterrupt
