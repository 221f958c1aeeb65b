"""CUDA, as little of it as engines need: memory, streams, events and graphs of one device.

It speaks to the driver through `cuda.bindings.driver`, whose functions return a status and then
their results. Everything is ordered by a stream; only `Stream.wait` waits for the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import numpy as np

from diffveil.engines._base import Array
from diffveil.engines._foreign import foreign
from diffveil.errors import BackendUnavailableError, EngineError

__all__ = ["ALIGNMENT", "Device", "Event", "Graph", "Memory", "Pinned", "Stream", "aligned"]

ALIGNMENT = 256
"""Bytes that a tensor's address is a multiple of."""


def aligned(size: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Device:
    """One GPU, in its primary context. Safe to share between threads.

    Args:
        ordinal: Its number among those that are visible to this process.
        driver: The driver's functions; by default `cuda.bindings.driver`.

    Raises:
        BackendUnavailableError: The bindings or the driver are not installed.
        EngineError: There is no such GPU.
    """

    def __init__(self, ordinal: int = 0, *, driver: Any = None) -> None:
        self._driver = load_driver() if driver is None else driver
        try:
            self.call("cuInit", 0)
        except EngineError as error:
            raise BackendUnavailableError(f"no driver of an NVIDIA GPU: {error}") from error
        self._handle = self.call("cuDeviceGet", ordinal)
        self._context = self.call("cuDevicePrimaryCtxRetain", self._handle)
        self.ordinal = ordinal

    @property
    def name(self) -> str:
        """The GPU's name."""
        raw: bytes = self.call("cuDeviceGetName", 100, self._handle)
        return raw.split(b"\0")[0].decode(errors="replace")

    @property
    def driver_version(self) -> str:
        """The newest CUDA version that the driver speaks, such as `13.0`."""
        number = int(self.call("cuDriverGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    def free_and_total(self) -> tuple[int, int]:
        """Bytes of device memory that are free, and all of them."""
        free, total = self.use("cuMemGetInfo")
        return int(free), int(total)

    def memory(self, size: int) -> Memory:
        """Device memory of that many bytes.

        Raises:
            EngineError: There is not so much.
        """
        return Memory(self, size)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Pinned:
        """An array in host memory that the device reads and writes directly."""
        return Pinned(self, shape, np.dtype(dtype))

    def stream(self) -> Stream:
        """A stream that is ordered against no other."""
        return Stream(self)

    def activate(self) -> None:
        """Make this device's context the thread's: threads begin with none, libraries change it."""
        self.call("cuCtxSetCurrent", self._context)

    def use(self, function: str, *arguments: Any) -> Any:
        """Call a function of the driver in this device's context; see `call`."""
        self.activate()
        return self.call(function, *arguments)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the driver.

        Returns:
            Its result; a tuple of several, or None.

        Raises:
            EngineError: It reported an error, or the driver or the bindings lack it.
        """
        with foreign(f"CUDA: {function} cannot be called"):
            status, *results = getattr(self._driver, function)(*arguments)
            failed = int(status) != 0
        if failed:
            name = getattr(status, "name", str(status))
            hint = ""
            if "OUT_OF_MEMORY" in name:
                hint = "; give max_memory, fewer faces a call, or free memory of the GPU"
            raise EngineError(f"CUDA: {function} reports {name}{hint}")
        if len(results) > 1:
            return tuple(results)
        return results[0] if results else None

    def constant(self, group: str, name: str) -> Any:
        """A constant of the driver's interface.

        Raises:
            EngineError: The bindings lack it.
        """
        with foreign(f"CUDA: {group} has no {name}"):
            return getattr(getattr(self._driver, group), name)


class Memory:
    """Device memory; freed when closed or no longer referred to.

    Attributes:
        address: Where it lies; a multiple of `ALIGNMENT`.
        size: Bytes.
    """

    def __init__(self, device: Device, size: int) -> None:
        self._device, self.size = device, size
        self._handle: Any = None
        self._handle = device.use("cuMemAlloc", max(size, 1))
        self.address = int(self._handle)

    def upload(self, array: Array, stream: Stream, offset: int = 0) -> None:
        """Copy an array's bytes here, in the stream's order.

        An ordinary array may be changed once this returns; a pinned one when the stream has
        come that far.
        """
        array = np.ascontiguousarray(array)
        assert offset + array.nbytes <= self.size
        stream.enqueue("cuMemcpyHtoDAsync", self.address + offset, array.ctypes.data, array.nbytes)

    def download(self, array: Array, stream: Stream) -> None:
        """Copy bytes from here into a contiguous array, in the stream's order."""
        assert array.flags.c_contiguous
        assert array.nbytes <= self.size
        stream.enqueue("cuMemcpyDtoHAsync", array.ctypes.data, self.address, array.nbytes)

    def close(self) -> None:
        """Free it; the device must be done with it."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._device.use("cuMemFree", handle)

    def __del__(self) -> None:
        _forget(self)


class Pinned:
    """Page-locked host memory.

    Attributes:
        array: The memory as an array.
    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._device = device
        self._handle: Any = None
        size = max(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, 1)
        self._handle = device.use("cuMemHostAlloc", size, 0)
        raw = (ctypes.c_byte * size).from_address(int(self._handle))
        count = int(np.prod(shape, dtype=np.int64))
        self.array: Array = np.frombuffer(memoryview(raw), dtype, count).reshape(shape)

    def close(self) -> None:
        """Free it; the device must be done with it, and nobody may use the array."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._device.use("cuMemFreeHost", handle)

    def __del__(self) -> None:
        _forget(self)


class Stream:
    """Work in order.

    Attributes:
        handle: Number by which libraries know it.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._handle: Any = None
        flags = device.constant("CUstream_flags", "CU_STREAM_NON_BLOCKING")
        self._handle = device.use("cuStreamCreate", flags)
        self.handle = int(self._handle)

    def enqueue(self, function: str, *arguments: Any) -> None:
        """Call an asynchronous function of the driver, whose last argument is the stream."""
        self._device.use(function, *arguments, self._handle)

    def wait(self) -> None:
        """Until the device has done all of it.

        Raises:
            EngineError: Something in it failed.
        """
        self._device.use("cuStreamSynchronize", self._handle)

    def event(self) -> Event:
        """Mark this point of the stream's work."""
        return Event(self._device, self._handle)

    @contextmanager
    def capture(self) -> Iterator[list[Graph]]:
        """Record what is enqueued instead of doing it; the graph is in the list afterwards.

        Yields:
            An empty list that the graph is put into.
        """
        mode = self._device.constant("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL")
        found: list[Graph] = []
        self._device.use("cuStreamBeginCapture", self._handle, mode)
        try:
            yield found
        except BaseException:
            # The stream must leave its capture, whatever the driver says about its content.
            with suppress(EngineError):
                left = self._device.call("cuStreamEndCapture", self._handle)
                self._device.call("cuGraphDestroy", left)
            raise
        graph = self._device.use("cuStreamEndCapture", self._handle)
        found.append(Graph(self._device, graph))

    def close(self) -> None:
        """Free it."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._device.use("cuStreamDestroy", handle)

    def __del__(self) -> None:
        _forget(self)


class Event:
    """A point of a stream's work."""

    def __init__(self, device: Device, stream: Any) -> None:
        self._device = device
        self._handle: Any = None
        self._handle = device.use("cuEventCreate", 0)
        device.use("cuEventRecord", self._handle, stream)

    def milliseconds_since(self, earlier: Event) -> float:
        """Time of the device between two points that it has passed."""
        return float(self._device.use("cuEventElapsedTime", earlier._handle, self._handle))

    def close(self) -> None:
        """Free it."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._device.use("cuEventDestroy", handle)

    def __del__(self) -> None:
        _forget(self)


class Graph:
    """Recorded work, done again by one call."""

    def __init__(self, device: Device, graph: Any) -> None:
        self._device = device
        self._handle: Any = None
        try:
            self._handle = device.use("cuGraphInstantiate", graph, 0)
        finally:
            device.use("cuGraphDestroy", graph)

    def launch(self, stream: Stream) -> None:
        """Do the work in the stream's order, on the addresses that were recorded."""
        stream.enqueue("cuGraphLaunch", self._handle)

    def close(self) -> None:
        """Free it; the device must be done with it."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._device.use("cuGraphExecDestroy", handle)

    def __del__(self) -> None:
        _forget(self)


def load_driver() -> Any:
    """The driver's functions.

    Raises:
        BackendUnavailableError: The bindings are not installed.
    """
    try:
        return import_module("cuda.bindings.driver")
    except Exception as error:  # of a broken installation anything can come
        raise BackendUnavailableError(
            f"cuda-bindings cannot be imported ({error}): pip install 'diffveil[tensorrt-rtx]'"
        ) from error


def _forget(resource: Any) -> None:
    """Close at the end of a life; where the driver itself is gone there is nothing to do."""
    with suppress(Exception):
        resource.close()
