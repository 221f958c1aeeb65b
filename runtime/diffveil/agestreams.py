"""What age reads plaintext from and writes it to: memory that can be wiped afterwards."""

from __future__ import annotations

import io
from typing import Any

__all__ = ["Sink", "Source"]


class Source(io.RawIOBase):
    """Lends a buffer to pyrage piece by piece, so that no second whole copy is made."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        end = len(self._view) if size < 0 else self._position + size
        piece = bytes(self._view[self._position : end])
        self._position += len(piece)
        return piece


class Sink(io.RawIOBase):
    """Collects plaintext in one buffer that never grows: growing would leave copies behind."""

    def __init__(self, capacity: int) -> None:
        self._buffer = bytearray(capacity)
        self._size = 0

    def write(self, piece: Any) -> int:
        end = self._size + len(piece)
        self._buffer[self._size : end] = piece
        self._size = end
        return len(piece)

    def wipe(self) -> None:
        """Overwrite what was written."""
        self._buffer[:] = bytes(len(self._buffer))

    def plain(self) -> bytearray:
        """What was written; the buffer itself."""
        del self._buffer[self._size :]
        return self._buffer
