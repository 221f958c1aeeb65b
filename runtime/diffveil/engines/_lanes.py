"""Lanes: a stream and the activation memory that all programs on it share, one call at a time."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from diffveil.engines._cuda import Device, Memory, Stream
from diffveil.errors import EngineError

__all__ = ["KeptLoops", "Lane", "Lanes"]

_KEPT_LOOPS = 8


class Lane:
    """A stream and scratch memory. Whoever has borrowed it has it alone.

    The programs of a bundle never run at once within one call, so one memory, as large as the
    largest needs, serves them all.

    Args:
        device: The GPU.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stream: Stream = device.stream()
        self._scratch: Memory | None = None

    def scratch(self, size: int) -> Memory:
        """Activation memory of at least that many bytes; a larger one takes a smaller one's place.

        Raises:
            EngineError: The device has not so much memory.
        """
        if self._scratch is None or self._scratch.size < size:
            self.stream.wait()  # nothing may still write to the old one
            if self._scratch is not None:
                self._scratch.close()
                self._scratch = None
            self._scratch = self.device.memory(size)
        return self._scratch

    def close(self) -> None:
        """Free the stream and the memory; the device must be done with them."""
        if self._scratch is not None:
            self._scratch.close()
        self.stream.close()


class KeptLoops:
    """Loops that wait to be used again, with their buffers and graphs; the oldest go first.

    They do not keep their engines alive: those hold the lanes, and the lanes hold this.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loops: OrderedDict[Hashable, tuple[Any, list[weakref.ref[Any]]]] = OrderedDict()

    def take(self, key: Hashable, engines: Sequence[object]) -> Any:
        """The loop over just these engines that was kept under that key; None without one."""
        with self._lock:
            loop, made = self._loops.pop(key, (None, []))
        return loop if [ref() for ref in made] == list(engines) else None

    def keep(self, key: Hashable, loop: Any, engines: Sequence[object]) -> None:
        """Keep a loop over engines for whoever asks for it next."""
        with self._lock:
            self._loops[key] = loop, [weakref.ref(engine) for engine in engines]
            dropped = [
                self._loops.popitem(last=False) for _ in range(len(self._loops) - _KEPT_LOOPS)
            ]
        del dropped  # what that frees calls the driver: not under the lock

    def forget(self, engine: object) -> None:
        """Drop all loops over an engine."""
        with self._lock:
            gone = [k for k, (_, made) in self._loops.items() if engine in [ref() for ref in made]]
            dropped = [self._loops.pop(key) for key in gone]
        del dropped


class Lanes:
    """A few lanes of one device, made when they are first needed. Safe to share between threads.

    Args:
        device: The GPU.
        limit: Most calls that run at once; further ones wait.

    Attributes:
        loops: Loops on these lanes that are not in use.
    """

    def __init__(self, device: Device, limit: int) -> None:
        self.device = device
        self.loops = KeptLoops()
        self._limit = limit
        self._made = 0
        self._free: list[Lane] = []
        self._changed = threading.Condition()

    def take(self) -> Lane:
        """A lane that nobody else has; `give` it back.

        Raises:
            EngineError: The device fails to make one.
        """
        with self._changed:
            while not self._free and self._made >= self._limit:
                self._changed.wait()
            if self._free:
                # The last one given back: its memory is warm, and others may never be needed.
                return self._free.pop()
            self._made += 1
        try:
            return Lane(self.device)
        except BaseException:
            with self._changed:
                self._made -= 1
                self._changed.notify()
            raise

    def give(self, lane: Lane) -> None:
        """Give a lane back."""
        with self._changed:
            self._free.append(lane)
            self._changed.notify()

    @contextmanager
    def borrowed(self) -> Iterator[Lane]:
        """A lane for as long as the block runs, done with all its work when it ends."""
        lane = self.take()
        try:
            yield lane
        except BaseException:
            # What was enqueued still uses buffers that the caller may drop.
            with suppress(EngineError):
                lane.stream.wait()
            raise
        finally:
            self.give(lane)
