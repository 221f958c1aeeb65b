"""A stand-in for `cuda.bindings.driver`: its memory is the host's, and its streams are lazy.

What is enqueued runs only when its stream is waited for, so a missing wait shows as old numbers,
and memory that is freed or reused too early as an error. Captured work runs at every launch, on the
addresses that were recorded.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

__all__ = ["FakeDriver", "Status"]


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


Work = Callable[[], Status]


class _Handle:
    """What the bindings return: an object that is a number."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value

    def __hash__(self) -> int:
        return self.value

    def __eq__(self, other: object) -> bool:
        return int(self) == int(other)  # type: ignore[call-overload, no-any-return]


class FakeDriver:
    """The functions that engines call.

    Attributes:
        calls: How often each was called.
        fail: Functions that report an error, or raise it, at their next calls.
        total: Bytes of device memory.
    """

    CUresult = Status
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, total: int = 1 << 30) -> None:
        self.calls: dict[str, int] = {}
        self.fail: dict[str, Status | Exception] = {}
        self.total = total
        self.blocks: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.queues: dict[int, list[Work]] = {}
        self.captures: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self._next = 1000

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cu") or not callable(value):
            return value

        def counted(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            fault = self.fail.get(name)
            if isinstance(fault, Exception):
                raise fault
            return value(*arguments) if fault is None else (fault,)

        return counted

    @property
    def used(self) -> int:
        """Bytes of device memory in use."""
        return sum(len(block) for block in self.blocks.values())

    def on_stream(self, stream: int, work: Work) -> Status:
        """Add work of a library's own to a stream."""
        stream = int(stream)
        (self.captures if stream in self.captures else self.queues)[stream].append(work)
        return Status.CUDA_SUCCESS

    def valid(self, address: int, size: int) -> bool:
        """Whether device memory holds those bytes now."""
        return any(
            start <= address and address + size <= start + len(block)
            for start, block in self.blocks.items()
        )

    def cuInit(self, flags: int) -> Any:
        return (Status.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal: int) -> Any:
        if ordinal:
            return (Status.CUDA_ERROR_INVALID_VALUE, None)
        return Status.CUDA_SUCCESS, _Handle(0)

    def cuDeviceGetName(self, length: int, device: Any) -> Any:
        return Status.CUDA_SUCCESS, b"A fake GPU\0\0"

    def cuDriverGetVersion(self) -> Any:
        return Status.CUDA_SUCCESS, 13020

    def cuDevicePrimaryCtxRetain(self, device: Any) -> Any:
        return Status.CUDA_SUCCESS, _Handle(7)

    def cuCtxSetCurrent(self, context: Any) -> Any:
        return (Status.CUDA_SUCCESS,)

    def cuMemGetInfo(self) -> Any:
        return Status.CUDA_SUCCESS, self.total - self.used, self.total

    def cuMemAlloc(self, size: int) -> Any:
        if self.used + size > self.total:
            return (Status.CUDA_ERROR_OUT_OF_MEMORY, None)
        block = (ctypes.c_byte * (size + 256))()
        start = -(-ctypes.addressof(block) // 256) * 256
        self.blocks[start] = _Aligned(block, size)
        return Status.CUDA_SUCCESS, _Handle(start)

    def cuMemFree(self, address: Any) -> Any:
        del self.blocks[int(address)]
        return (Status.CUDA_SUCCESS,)

    def cuMemHostAlloc(self, size: int, flags: int) -> Any:
        block = (ctypes.c_byte * size)()
        self.pinned[ctypes.addressof(block)] = block
        return Status.CUDA_SUCCESS, ctypes.addressof(block)

    def cuMemFreeHost(self, address: Any) -> Any:
        del self.pinned[int(address)]
        return (Status.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags: int) -> Any:
        self._next += 1
        self.queues[self._next] = []
        return Status.CUDA_SUCCESS, _Handle(self._next)

    def cuStreamDestroy(self, stream: Any) -> Any:
        del self.queues[int(stream)]
        return (Status.CUDA_SUCCESS,)

    def cuMemcpyHtoDAsync(self, device: int, host: int, size: int, stream: Any) -> Any:
        if not self._is_pinned(host, size):
            if int(stream) in self.captures:
                return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
            copy = ctypes.string_at(host, size)  # the driver has read it when the call returns
            return (self.on_stream(stream, lambda: self._move(device, copy, size, device)),)
        return (self.on_stream(stream, lambda: self._move(device, host, size, device)),)

    def cuMemcpyDtoHAsync(self, host: int, device: int, size: int, stream: Any) -> Any:
        if not self._is_pinned(host, size) and int(stream) in self.captures:
            return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        return (self.on_stream(stream, lambda: self._move(host, device, size, device)),)

    def cuStreamSynchronize(self, stream: Any) -> Any:
        if int(stream) in self.captures:
            return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        queue, self.queues[int(stream)] = self.queues[int(stream)], []
        for work in queue:
            status = work()
            if status != Status.CUDA_SUCCESS:
                return (status,)
        return (Status.CUDA_SUCCESS,)

    def cuStreamBeginCapture(self, stream: Any, mode: int) -> Any:
        self.captures[int(stream)] = []
        return (Status.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream: Any) -> Any:
        self._next += 1
        self.graphs[self._next] = self.captures.pop(int(stream))
        return Status.CUDA_SUCCESS, _Handle(self._next)

    def cuGraphInstantiate(self, graph: Any, flags: int) -> Any:
        self._next += 1
        self.executables[self._next] = list(self.graphs[int(graph)])
        return Status.CUDA_SUCCESS, _Handle(self._next)

    def cuGraphDestroy(self, graph: Any) -> Any:
        del self.graphs[int(graph)]
        return (Status.CUDA_SUCCESS,)

    def cuGraphLaunch(self, executable: Any, stream: Any) -> Any:
        for work in self.executables[int(executable)]:
            self.on_stream(stream, work)
        return (Status.CUDA_SUCCESS,)

    def cuGraphExecDestroy(self, executable: Any) -> Any:
        del self.executables[int(executable)]
        return (Status.CUDA_SUCCESS,)

    def cuEventCreate(self, flags: int) -> Any:
        self._next += 1
        return Status.CUDA_SUCCESS, _Handle(self._next)

    def cuEventRecord(self, event: Any, stream: Any) -> Any:
        return (Status.CUDA_SUCCESS,)

    def cuEventElapsedTime(self, start: Any, end: Any) -> Any:
        return Status.CUDA_SUCCESS, float(int(end) - int(start))

    def cuEventDestroy(self, event: Any) -> Any:
        return (Status.CUDA_SUCCESS,)

    def _is_pinned(self, address: int, size: int) -> bool:
        return any(
            start <= address and address + size <= start + len(block)
            for start, block in self.pinned.items()
        )

    def _move(self, to: int, source: int | bytes, size: int, device: int) -> Status:
        if not self.valid(device, size):
            return Status.CUDA_ERROR_ILLEGAL_ADDRESS
        ctypes.memmove(to, source, size)
        return Status.CUDA_SUCCESS


class _Aligned:
    """A block of which the first aligned bytes are used."""

    def __init__(self, block: Any, size: int) -> None:
        self.block, self.size = block, size

    def __len__(self) -> int:
        return self.size
