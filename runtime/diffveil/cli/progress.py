"""A progress bar for people; nothing at all for scripts."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

__all__ = ["ProgressBar"]

_WIDTH = 28  # characters between the brackets
_INTERVAL = 0.1  # seconds between two redraws


class ProgressBar:
    """Draws on one line of a terminal and wipes it at the end; silent where there is none.

    Usable as the library's `progress` callback: `bar(done, total)`.

    Args:
        label: what is being done, before the bar.
        stream: where to draw; standard error by default, so that standard output stays data.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label = label
        self._stream = sys.stderr if stream is None else stream
        self._active = self._stream.isatty()
        self._started = time.monotonic()
        self._drawn_at = 0.0
        self._drawn = 0  # columns to wipe

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` of `total` steps are finished."""
        now = time.monotonic()
        if not self._active or (done < total and now - self._drawn_at < _INTERVAL):
            return
        share = min(max(done / total, 0.0), 1.0) if total > 0 else 1.0
        bar = ("=" * round(share * _WIDTH)).ljust(_WIDTH)
        self._draw(f"{self.label} [{bar}] {share:4.0%} {now - self._started:5.1f} s")
        self._drawn_at = now

    def message(self, text: str, stream: TextIO) -> None:
        """Prints a line on `stream` without leaving half a bar before it."""
        self._draw("")
        print(text, file=stream, flush=True)

    def _draw(self, text: str) -> None:
        if not self._active or (not text and not self._drawn):
            return
        self._stream.write("\r" + text.ljust(self._drawn) + ("" if text else "\r"))
        self._stream.flush()
        self._drawn = len(text)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._draw("")
