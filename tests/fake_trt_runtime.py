"""A stand-in for running TensorRT engines: ONNX Runtime computes, on the memory of a fake device.

An engine's bytes name an ONNX file. Execution is enqueued on a stream of `FakeDriver` and reads and
writes the addresses that were bound when it was enqueued; it also fills its activation memory with
rubbish, so that memory which is another's is found out.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from diffveil.bundle import Bundle
from diffveil.engines.onnxrt import session_options
from diffveil.engines.records import EngineRecord, ShapeRange, engine_folder, program_digest
from diffveil.programs import ALL_PROGRAMS
from diffveil_export.engines.profiles import BatchRange, profile_of
from diffveil_export.engines.records import publish
from fake_cuda import FakeDriver, Status
from fake_tensorrt import ILogger, Severity

__all__ = ["TARGET", "VERSION", "FakeTensorRT", "write_engines"]

VERSION, TARGET = "9.9.9", "sm89"


class Strategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class FakeTensorRT:
    """The module.

    Attributes:
        engines: Engines that were deserialised.
        refitted: ONNX files that engines were filled from.
        contexts: Contexts that were made.
        capturable: What contexts say about being captured; None: they cannot say.
        caches: Runtime caches that were made; None: the library has none.
        compiled: Engines whose kernels no cache had.
        by_shapes: Whether contexts say how much memory their shapes need.
        refuse: Message with which deserialising fails, if any.
        raises: Names of functions that raise an error of the library's own.
        spoilt: Programs whose outputs are NaN.
    """

    __version__ = VERSION
    ILogger = ILogger
    ExecutionContextAllocationStrategy = Strategy

    def __init__(self, driver: FakeDriver, *, rtx: bool = True) -> None:
        self.driver = driver
        self.engines = self.contexts = 0
        self.refitted: list[str] = []
        self.capturable: bool | None = True
        self.caches: list[FakeCache] | None = [] if rtx else None
        self.compiled, self.by_shapes = 0, rtx
        self.refuse = ""
        self.raises: set[str] = set()
        self.spoilt: set[str] = set()
        self.refit_fails = False
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def entered(self, function: str) -> None:
        """Told of every function that is called."""
        if function in self.raises:
            raise RuntimeError(f"{function} is broken")

    def Runtime(self, logger: Any) -> Any:
        self.entered("Runtime")

        def deserialize(data: bytes) -> Any:
            self.entered("deserialize_cuda_engine")
            if self.refuse:
                logger.log(Severity.ERROR, self.refuse)
                return None
            self.engines += 1
            return _Engine(self, json.loads(data))

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    def Refitter(self, engine: Any, logger: Any) -> Any:
        self.entered("Refitter")

        def refit() -> bool:
            engine.filled = True
            return True

        return SimpleNamespace(refit_cuda_engine=refit)

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        def read(path: str) -> bool:
            if self.refit_fails:
                logger.log(Severity.ERROR, "weights 'w' not found")
                return False
            self.refitted.append(Path(path).name)
            return True

        return SimpleNamespace(refit_from_file=read)


class FakeCache:
    """A runtime cache; it takes what another one gave, and refuses anything else."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self.kernels, self._trt = b"", trt
        trt.entered("create_runtime_cache")
        assert trt.caches is not None
        trt.caches.append(self)

    def deserialize(self, data: bytes) -> bool:
        self._trt.entered("deserialize")
        if data != b"kernels":
            return False
        self.kernels = data
        return True

    def serialize(self) -> bytes:
        self._trt.entered("serialize")
        return self.kernels


class _Engine:
    def __init__(self, trt: FakeTensorRT, content: dict[str, Any]) -> None:
        self.trt, self.scratch, self.most = trt, int(content["scratch"]), int(content["most"])
        self.program = Path(content["onnx"]).stem
        self.filled = not content["stripped"]
        self.session = ort.InferenceSession(
            content["onnx"], session_options(1), providers=["CPUExecutionProvider"]
        )

    @property
    def device_memory_size_v2(self) -> int:
        self.trt.entered("device_memory_size_v2")
        return self.scratch

    def create_runtime_config(self) -> Any:
        self.trt.entered("create_runtime_config")
        config = SimpleNamespace(strategy=None, cache=None)

        def use(cache: FakeCache) -> bool:
            self.trt.entered("set_runtime_cache")
            config.cache = cache
            return True

        if self.trt.caches is not None:
            config.create_runtime_cache = lambda: FakeCache(self.trt)
            config.set_runtime_cache = use

        def choose(strategy: Strategy) -> None:
            config.strategy = strategy

        config.set_execution_context_allocation_strategy = choose
        return config

    def create_execution_context(self, how: Any) -> Any:
        self.trt.entered("create_execution_context")
        if isinstance(how, SimpleNamespace):
            assert how.dynamic_shapes_kernel_specialization_strategy == "eager"
            if how.cache is not None and how.cache.kernels == b"":
                self.trt.compiled += 1
                how.cache.kernels = b"kernels"
            how = how.strategy
        assert how is Strategy.USER_MANAGED
        self.trt.contexts += 1
        context = _Context(self)
        if self.trt.capturable is not None:
            context.is_stream_capturable = context.says_capturable
        return context


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine, self._driver = engine, engine.trt.driver
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._needed = engine.scratch
        if engine.trt.by_shapes:
            self.update_device_memory_size_for_shapes = self._for_shapes
        self.is_stream_capturable: Any = None
        del self.is_stream_capturable

    def says_capturable(self, stream: int) -> bool:
        self._engine.trt.entered("is_stream_capturable")
        return bool(self._engine.trt.capturable)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._engine.trt.entered("set_input_shape")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._engine.trt.entered("set_tensor_address")
        assert address % 256 == 0
        self._addresses[name] = address
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self._engine.trt.entered("set_device_memory")
        assert size >= self._needed
        self._scratch = address, size

    def _for_shapes(self) -> int:
        self._engine.trt.entered("update_device_memory_size_for_shapes")
        (rows,) = {shape[0] for shape in self._shapes.values()}
        self._needed = self._engine.scratch * rows // self._engine.most
        return self._needed

    def execute_async_v3(self, stream: int) -> bool:
        self._engine.trt.entered("execute_async_v3")
        addresses, scratch, session = dict(self._addresses), self._scratch, self._engine.session

        def work() -> Status:
            if not self._driver.valid(*scratch) or not self._engine.filled:
                return Status.CUDA_ERROR_ILLEGAL_ADDRESS
            feed = {}
            for tensor in session.get_inputs():
                dtype = np.dtype(_TYPES[tensor.type])
                array = np.empty(self._shapes[tensor.name], dtype)
                if not self._driver.valid(addresses[tensor.name], array.nbytes):
                    return Status.CUDA_ERROR_ILLEGAL_ADDRESS
                ctypes.memmove(array.ctypes.data, addresses[tensor.name], array.nbytes)
                feed[tensor.name] = array
            names = [o.name for o in session.get_outputs()]
            outputs = session.run(names, feed)
            ctypes.memset(scratch[0], 0xA5, scratch[1])
            for name, array in zip(names, outputs, strict=True):
                if not self._driver.valid(addresses[name], array.nbytes):
                    return Status.CUDA_ERROR_ILLEGAL_ADDRESS
                array = np.ascontiguousarray(array)
                if self._engine.program in self._engine.trt.spoilt:
                    array = np.full_like(array, np.nan)
                ctypes.memmove(addresses[name], array.ctypes.data, array.nbytes)
            return Status.CUDA_SUCCESS

        return self._driver.on_stream(stream, work) == Status.CUDA_SUCCESS


_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def write_engines(
    bundle: Bundle,
    backend: str = "tensorrt-rtx",
    *,
    batch: tuple[int, ...] = (1, 4, 8),
    scratch: int = 4096,
    stripped: bool = False,
    programs: tuple[str, ...] | None = None,
) -> Path:
    """Put engines of the fake library beside a bundle's manifest; the folder."""
    folder = engine_folder(bundle, backend, VERSION, TARGET)
    folder.mkdir(parents=True, exist_ok=True)
    for position, name in enumerate(programs or bundle.manifest.programs):
        path, spec = bundle.program_path(name), ALL_PROGRAMS[name]
        content = {
            "onnx": str(path),
            "scratch": scratch * (1 + position),
            "most": max(batch),
            "stripped": stripped,
        }
        data = json.dumps(content).encode()
        entry = bundle.program(name)
        inputs = {t.name: t.dtype for t in entry.inputs}
        declared = {t.name: t.shape(bundle.dimensions) for t in spec.inputs if t.name in inputs}
        network = {
            n: [-1 if isinstance(a, str) else a for a in shape] for n, shape in declared.items()
        }
        profile: dict[str, ShapeRange] = profile_of(
            spec, bundle.dimensions, BatchRange.of(batch), network
        )
        record = EngineRecord(
            program=name,
            program_sha256=program_digest(bundle, name),
            backend=backend,
            version=VERSION,
            target=TARGET,
            recipe=2,
            profile=profile,
            inputs=inputs,
            outputs={t.name: t.dtype for t in entry.outputs},
            flags={"weights": "folded", "strip_weights": stripped},
            file=f"{name}.engine",
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            seconds=1.0,
        )
        publish(folder, record, data)
    return folder
