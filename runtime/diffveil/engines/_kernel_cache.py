"""Kernels that TensorRT-RTX compiles when an engine first runs, kept for the next process.

The library checks for itself whether a cache fits the GPU, the driver and its own version, and
refuses one that does not. They stand in the file's name all the same, so that machines which share
a folder do not overwrite each other's.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffveil.engines._cuda import Device
from diffveil.engines.records import open_own
from diffveil.errors import EngineError

__all__ = ["KernelCache"]

_MAX_BYTES = 1 << 30
_log = logging.getLogger(__name__)


class KernelCache:
    """The compiled kernels of one engine, in a file beside it. Safe to share between threads.

    A cache that cannot be read, used or written costs time and nothing else: it is passed over.
    Like engines, caches are code: one that somebody else could have written is not read.

    Args:
        engine: The engine's file; its folder's name has the library's version.
        backend: Name of the library, for messages.
        device: The GPU.
    """

    def __init__(self, engine: Path, backend: str, device: Device) -> None:
        where = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.name}-driver-{device.driver_version}")
        self.path = engine.with_name(f"{engine.stem}.{where}.kernels")
        self._backend = backend
        self._lock = threading.Lock()
        self._cache: Any = None
        self._saved = b""
        self._attached = False

    def attach(self, config: Any) -> None:
        """Give a runtime configuration the cache, where the library has such a thing.

        Args:
            config: The library's `IRuntimeConfig`, before a context is made with it.
        """
        make = getattr(config, "create_runtime_cache", None)
        if make is None:
            return
        with self._lock:
            try:
                if self._cache is None:
                    self._cache = make()
                    self._read()
                config.set_runtime_cache(self._cache)
            except Exception as error:  # the library's own classes
                _log.debug("kernels of %s are not kept: %s", self.path.stem, error)
                return
            self._attached = True

    def save(self) -> None:
        """Write what was compiled since contexts were made; nothing where nothing was."""
        with self._lock:
            if not self._attached:
                return
            self._attached = False
            try:
                data = bytes(memoryview(self._cache.serialize()))
            except Exception as error:  # the library's own classes
                _log.debug("kernels of %s are not kept: %s", self.path.stem, error)
                return
            if data == self._saved or len(data) > _MAX_BYTES:
                return
            self._saved = data
            self._write(data)

    def _read(self) -> None:
        if not os.path.lexists(self.path):
            return
        try:
            with open_own(self.path) as stream:
                data = stream.read(_MAX_BYTES + 1)
        except (EngineError, OSError) as error:
            self._passed_over(str(error))
            return
        try:
            fits = len(data) <= _MAX_BYTES and self._cache.deserialize(data)
        except Exception as error:  # the library's own classes
            _log.debug("kernels of %s cannot be read: %s", self.path.stem, error)
            fits = False
        if not fits:
            self._passed_over("it is damaged, or of another GPU, driver or version")
            return
        self._saved = data

    def _passed_over(self, why: str) -> None:
        warnings.warn(
            f"{self._backend}: kernels kept in '{self.path.name}' are passed over and compiled "
            f"again: {why}",
            RuntimeWarning,
            stacklevel=2,
        )

    def _write(self, data: bytes) -> None:
        temporary = ""
        try:
            handle, temporary = tempfile.mkstemp(prefix=".kernels-", dir=self.path.parent)
            with open(handle, "wb") as stream:
                stream.write(data)
            os.replace(temporary, self.path)
        except OSError as error:  # a folder that is not ours to write: common, and harmless
            _log.debug("kernels are not kept in %s: %s", self.path.parent, error.strerror)
            if temporary:
                with suppress(OSError):
                    os.unlink(temporary)
