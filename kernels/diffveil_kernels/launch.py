"""Runs compiled kernels on a GPU through `cuda-core`: neither Triton nor PyTorch is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffveil_kernels.calls import Call
from diffveil_kernels.errors import (
    KernelInputError,
    KernelRecordError,
    KernelUnavailableError,
)
from diffveil_kernels.records import KernelRecord, read_cubin, read_records
from diffveil_kernels.specs import SPECS, TARGETS

__all__ = ["CudaCore", "DeviceLayer", "KernelLauncher", "pack_arguments", "record_for"]

_SCALARS: dict[str, type[np.number[Any]]] = {
    "i32": np.int32,
    "i64": np.int64,
    "fp32": np.float32,
    "fp64": np.float64,
}
_TEGRA = 87  # its kernels and those of other GPUs of its generation are not exchangeable


class DeviceLayer(Protocol):
    """The few things that a launcher wants of a GPU."""

    @property
    def capability(self) -> int:
        """Compute capability, 89 for 8.9."""

    def load(self, cubin: bytes, entry: str) -> Any:
        """Load a compiled kernel; returns what `launch` takes."""

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: Any,
        arguments: Sequence[np.number[Any]],
    ) -> None:
        """Enqueue a kernel; every argument is passed as the bytes that it has."""


class CudaCore:
    """A GPU as `cuda-core` shows it.

    Args:
        device: Number of the GPU.

    Raises:
        KernelUnavailableError: `cuda-core` or a GPU is missing.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            from cuda import core
        except ImportError as error:
            raise KernelUnavailableError(
                "kernels run through cuda-core, not installed here: pip install 'diffveil[kernels]'"
            ) from error
        self._core: Any = core
        try:
            self._device = core.Device(device)
            self._device.set_current()
            major, minor = self._device.compute_capability
        # cuda-core has no common base class: no driver, no GPU and a bad number all differ.
        except Exception as error:
            raise KernelUnavailableError(
                f"no CUDA device {device} to run kernels on ({type(error).__name__})"
            ) from error
        self._capability = int(10 * major + minor)

    @property
    def capability(self) -> int:
        """See `DeviceLayer.capability`."""
        return self._capability

    def load(self, cubin: bytes, entry: str) -> Any:
        """See `DeviceLayer.load`."""
        return self._core.ObjectCode.from_cubin(cubin, name=entry).get_kernel(entry)

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: Any,
        arguments: Sequence[np.number[Any]],
    ) -> None:
        """See `DeviceLayer.launch`; `stream` is a `cuda.core` stream or graph builder."""
        config = self._core.LaunchConfig(grid=grid, block=threads, shmem_size=shared)
        self._core.launch(stream, config, function, *arguments)


class KernelLauncher:
    """Compiled kernels of one folder on one GPU; each is loaded when it is first called.

    Args:
        folder: Where `diffveil build --kernels` put them.
        device: The GPU.

    Raises:
        KernelRecordError: The folder holds no sound record.
    """

    def __init__(self, folder: Path, device: DeviceLayer) -> None:
        self._folder, self._device = folder, device
        self._records = read_records(folder)
        self._loaded: dict[str, tuple[KernelRecord, Any]] = {}

    def run(self, calls: Sequence[Call], stream: Any) -> None:
        """Enqueue calls in order; returns at once.

        Args:
            calls: Whose buffers are addresses of device memory. The memory must stay until the
                stream has passed.
            stream: What the device layer takes.

        Raises:
            KernelUnavailableError: A kernel was not compiled for this GPU.
            KernelRecordError: A kernel's file is damaged, or of another version.
            KernelInputError: An argument does not fit its parameter; nothing was enqueued.
        """
        ready = []
        for call in calls:
            record, function = self._load(call.kernel)
            ready.append((record, function, call.grid, pack_arguments(record, call.arguments)))
        for record, function, grid, arguments in ready:
            self._device.launch(function, grid, record.threads, record.shared, stream, arguments)

    def _load(self, name: str) -> tuple[KernelRecord, Any]:
        if name not in self._loaded:
            record = record_for(self._records, name, self._device.capability)
            spec = SPECS[name]
            # Grids and arguments are made for today's kernel: another would leave memory unwritten.
            if (record.parameters, dict(record.constants)) != (
                spec.parameters,
                dict(spec.constants),
            ):
                raise KernelRecordError(
                    f"kernel '{name}' was compiled by another version of diffveil: "
                    "diffveil build BUNDLE --kernels"
                )
            function = self._device.load(read_cubin(self._folder, record), record.entry)
            self._loaded[name] = record, function
        return self._loaded[name]


def record_for(records: Sequence[KernelRecord], name: str, capability: int) -> KernelRecord:
    """The compiled form of a kernel that runs best on a GPU.

    One that was compiled for exactly this GPU, else for an earlier one of the same generation
    (CUDA C++ Programming Guide, "Binary Compatibility").

    Raises:
        KernelUnavailableError: There is none.
    """
    own = [record for record in records if record.name == name]
    exact = [record for record in own if record.target == capability]
    earlier = [
        record
        for record in own
        if record.target < capability
        and record.target // 10 == capability // 10
        and not record.arch.endswith("a")
        and _TEGRA not in (record.target, capability)
    ]
    if not exact and not earlier:
        remedy = (
            f"diffveil build BUNDLE --kernels --target {capability}"
            if capability in TARGETS
            else f"there are kernels for {', '.join(f'{t / 10:.1f}' for t in TARGETS)} only"
        )
        raise KernelUnavailableError(
            f"kernel '{name}' is not compiled for compute capability {capability / 10:.1f}: "
            f"{remedy}"
        )
    return max(exact or earlier, key=lambda record: record.target)


def pack_arguments(record: KernelRecord, arguments: Sequence[Any]) -> tuple[np.number[Any], ...]:
    """Every argument of a launch, of its parameter's width, and null for the hidden ones.

    Args:
        record: The kernel.
        arguments: Addresses (integers) for pointers, numbers for scalars.

    Raises:
        KernelInputError: There are too few or too many, or one does not fit.
    """
    if len(arguments) != len(record.parameters):
        raise KernelInputError(
            f"kernel '{record.name}' takes {len(record.parameters)} arguments, "
            f"received {len(arguments)}"
        )
    packed = [
        _pack(record.name, name, kind, value)
        for (name, kind), value in zip(record.parameters, arguments, strict=True)
    ]
    return (*packed, *(np.uint64(0) for _ in record.hidden))


def _pack(kernel: str, name: str, kind: str, value: Any) -> np.number[Any]:
    wanted = np.uint64 if kind.startswith("*") else _SCALARS[kind]
    integral = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if issubclass(wanted, np.integer):
        limits = np.iinfo(wanted)
        fits = integral and limits.min <= int(value) <= limits.max
    else:
        fits = integral or isinstance(value, (float, np.floating))
    if not fits:
        what = "an address" if kind.startswith("*") else kind
        # The value stays unnamed: an address tells where keys lie.
        raise KernelInputError(
            f"kernel '{kernel}', {name}: {type(value).__name__} does not fit, expected {what}"
        )
    packed: np.number[Any] = wanted(value)
    return packed
