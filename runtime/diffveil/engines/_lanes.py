"""Lanes: a stream and the activation memory that all programs on it share, one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from diffveil.engines._cuda import Device, Memory, Stream
from diffveil.errors import EngineError

__all__ = ["Lane", "Lanes"]


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


class Lanes:
    """A few lanes of one device, made when they are first needed. Safe to share between threads.

    Args:
        device: The GPU.
        limit: Most calls that run at once; further ones wait.
    """

    def __init__(self, device: Device, limit: int) -> None:
        self.device = device
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
