"""Backends `tensorrt-rtx` and `tensorrt`: engines that `diffveil build` put into the bundle."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from importlib import import_module
from types import MappingProxyType
from typing import Any

from diffveil.bundle import Bundle
from diffveil.engines._base import Availability, Engine
from diffveil.engines._cuda import Device, load_driver
from diffveil.engines._kernel_cache import KernelCache
from diffveil.engines._lanes import Lanes
from diffveil.engines.device import present_target
from diffveil.engines.native import NativeEngine
from diffveil.engines.records import EngineFile, find_engine
from diffveil.errors import BackendUnavailableError, DiffveilError, EngineError, OptionError
from diffveil.programs import ALL_PROGRAMS

__all__ = ["MODULES", "TensorRT", "message_logger"]

MODULES = MappingProxyType({"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"})
"""Module of each backend."""

_MAX_MESSAGES = 12
_log = logging.getLogger(__name__)


class TensorRT:
    """TensorRT-RTX or TensorRT, without PyTorch: streams and memory through `cuda-bindings`.

    Args:
        name: `tensorrt-rtx` or `tensorrt`.
        device: Number of the GPU.
        streams: Most calls that run at once; each has a stream and activation memory of its own.
        cuda_graphs: Whether calls and whole sampling loops are captured and replayed.
        import_module: Imports the library.
        driver: The driver's functions; by default `cuda.bindings.driver`.
        find_gpu: Names the compute capability of a GPU by its number, or gives None.

    Raises:
        OptionError: An argument is out of range.
    """

    def __init__(
        self,
        name: str = "tensorrt-rtx",
        *,
        device: int = 0,
        streams: int = 2,
        cuda_graphs: bool = True,
        import_module: Callable[[str], Any] = import_module,
        driver: Any = None,
        find_gpu: Callable[[int], str | None] = present_target,
    ) -> None:
        problems = []
        if name not in MODULES:
            problems.append(f"name: received {name!r}, expected one of {', '.join(MODULES)}")
        if device < 0:
            problems.append(f"device: received {device}, expected at least 0")
        if streams < 1:
            problems.append(f"streams: received {streams}, expected at least 1")
        if problems:
            raise OptionError("; ".join(problems))
        self._name, self._ordinal, self._streams = name, device, streams
        self._graphs = cuda_graphs
        self._import, self._driver, self._find_gpu = import_module, driver, find_gpu
        self._lock = threading.Lock()
        # Engines hold the lanes: their memory goes with the last engine.
        self._lanes: weakref.ref[Lanes] | None = None

    @property
    def name(self) -> str:
        """`tensorrt-rtx` or `tensorrt`."""
        return self._name

    @property
    def takes_loops(self) -> bool:
        """True: tensors stay on the device from call to call."""
        return True

    def available(self) -> Availability:
        """Whether the library, the bindings of CUDA and a GPU are here."""
        # The GPU first: importing the library takes long, and without one it is for nothing.
        target = self._find_gpu(self._ordinal)
        if target is None:
            return Availability(False, "no NVIDIA GPU or driver was found")
        try:
            trt = self._module()
            if self._driver is None:
                load_driver()
        except BackendUnavailableError as error:
            return Availability(False, str(error))
        return Availability(True, f"{self.name} {trt.__version__} on {target}")

    def ready(self, bundle: Bundle) -> Availability:
        """Whether the bundle holds an engine of every program for this library and GPU."""
        missing = []
        for program in bundle.manifest.programs:
            try:
                self._find(bundle, program)
            except DiffveilError as error:
                missing.append(str(error))
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            return Availability(False, missing[0] + more)
        return Availability(True, f"{len(bundle.manifest.programs)} engines")

    def max_batch(self, bundle: Bundle) -> int:
        """Most rows of one call that every engine of the bundle takes.

        Raises:
            EngineError: An engine is missing or may not be loaded.
        """
        return min(
            self._find(bundle, program).record.max_batch for program in bundle.manifest.programs
        )

    def load(self, bundle: Bundle, program: str) -> Engine:
        """Deserialise the engine of one program; see `Backend.load`."""
        trt = self._module()
        found = self._find(bundle, program)  # hashed when it is read
        lanes = self._open()
        # The library works in whatever context is current in this thread.
        lanes.device.activate()
        messages: list[str] = []
        try:
            engine = self._deserialised(trt, bundle, found, messages)
        except DiffveilError:
            raise
        except Exception as error:  # the library's classes share no public base
            messages.append(f"{type(error).__name__}: {error}")
            raise self._failed(program, "cannot load the engine", messages) from error
        _log.debug("loaded engine %s of %s on %s", program, bundle.name, self.name)
        return NativeEngine(
            trt,
            engine,
            found.record,
            ALL_PROGRAMS[program],
            bundle.dimensions,
            lanes,
            graphs=self._graphs,
            kernels=KernelCache(found.path, self.name, lanes.device),
        )

    def _deserialised(
        self, trt: Any, bundle: Bundle, found: EngineFile, messages: list[str]
    ) -> Any:
        """The library's engine, complete; raises whatever the library does."""
        logger = message_logger(trt, messages)
        engine = trt.Runtime(logger).deserialize_cuda_engine(found.read())
        if engine is None:
            raise self._failed(found.record.program, "refuses the engine", messages)
        if found.record.flags.get("strip_weights"):
            self._refit(trt, engine, logger, bundle, found, messages)
        return engine

    def _refit(
        self,
        trt: Any,
        engine: Any,
        logger: Any,
        bundle: Bundle,
        found: EngineFile,
        messages: list[str],
    ) -> None:
        """Fill an engine that was built without weights from the bundle's own program.

        The program's weights must be the engine's: where the builder restored compact weights
        first, nothing here could do that again.
        """
        program = found.record.program
        refitter = trt.Refitter(engine, logger)
        parser = trt.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_file(str(bundle.program_path(program))):
            raise self._failed(
                program,
                "cannot fill the engine with the bundle's weights (an engine without weights "
                "needs a bundle of float weights, or --weights stored)",
                messages,
            )
        if not refitter.refit_cuda_engine():
            raise self._failed(program, "cannot be given its weights", messages)

    def _module(self) -> Any:
        try:
            module = self._import(MODULES[self._name])
            _ = module.__version__  # folders that an uninstalled package leaves behind have none
        except Exception as error:  # of a broken installation anything can come
            raise BackendUnavailableError(
                f"{self._name} cannot be imported ({error}): pip install 'diffveil[{self._name}]'"
            ) from error
        return module

    def _find(self, bundle: Bundle, program: str) -> EngineFile:
        target = self._find_gpu(self._ordinal)
        if target is None:
            raise BackendUnavailableError(f"{self._name}: no NVIDIA GPU or driver was found")
        version = str(self._module().__version__)
        return find_engine(bundle, program, self._name, version, target, check_contents=False)

    def _open(self) -> Lanes:
        with self._lock:
            lanes = None if self._lanes is None else self._lanes()
            if lanes is None:
                lanes = Lanes(Device(self._ordinal, driver=self._driver), self._streams)
                self._lanes = weakref.ref(lanes)
            return lanes

    def _failed(self, program: str, what: str, messages: list[str]) -> EngineError:
        said = "; ".join(dict.fromkeys(messages)) or "it gave no reason"
        return EngineError(f"program '{program}': {self._name} {what}: {said}")


def message_logger(trt: Any, messages: list[str]) -> Any:
    """A logger of the library that keeps its errors for the exception to come.

    Args:
        trt: Module of the library.
        messages: The list that errors are added to; no more than a dozen.
    """
    severities = trt.ILogger.Severity
    levels = {severities.WARNING: logging.INFO, severities.INFO: logging.DEBUG}

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                _log.debug("%s", message)
                if len(messages) < _MAX_MESSAGES:
                    messages.append(message.strip())
            elif severity in levels:
                _log.log(levels[severity], "%s", message)

    return Logger()
