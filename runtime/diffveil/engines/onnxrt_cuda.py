"""Execution with ONNX Runtime on an NVIDIA GPU, with bindings on device memory."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike, fspath
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from diffveil.bundle import Bundle
from diffveil.engines._base import Array, Availability, Engine
from diffveil.engines._loop import Carry, Loop, WholeLoop
from diffveil.engines.bound import BoundLoop, BoundWholeLoop, DeviceBuffer, shape_of
from diffveil.engines.device import present_target
from diffveil.engines.onnxrt import ONNXRuntimeEngine, installed, open_session, session_options
from diffveil.errors import EngineError, OptionError
from diffveil.programs import Dimensions, ProgramSpec, check_inputs

__all__ = ["PROVIDERS", "BoundEngine", "ONNXRuntimeCUDA", "Provider"]

_INSTALL = "pip install 'diffveil[cuda]'"
_NO_GRAPH = -1
"""Number by which ONNX Runtime is told not to capture: buffers take turns in loops."""
_KEPT_BINDINGS = 4
"""Batch sizes for which an engine keeps its buffers."""

Provider: TypeAlias = Literal["cuda", "tensorrt", "tensorrt-rtx"]

PROVIDERS: Mapping[Provider, str] = MappingProxyType(
    {
        "cuda": "CUDAExecutionProvider",
        "tensorrt": "TensorrtExecutionProvider",
        "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    }
)
"""Names of ONNX Runtime's execution providers."""

_GRAPH_OPTION: Mapping[Provider, str] = MappingProxyType(
    {
        "cuda": "enable_cuda_graph",
        "tensorrt": "trt_cuda_graph_enable",
        "tensorrt-rtx": "enable_cuda_graph",
    }
)


class _Binding:
    """One program's buffers for one batch size, and a session's binding to them."""

    def __init__(
        self,
        session: Any,
        program: ProgramSpec,
        dimensions: Dimensions,
        rows: int,
        device: tuple[str, int],
        options: Any,
    ) -> None:
        self._session, self._options = session, options
        self._binding = session.io_binding()
        used = {i.name for i in session.get_inputs()}
        self._inputs, self._outputs = (
            {
                t.name: DeviceBuffer(shape_of(t, dimensions, rows), t.dtype, device)
                for t in tensors
                if t.name in used or tensors is program.outputs
            }
            for tensors in (program.inputs, program.outputs)
        )
        for name, buffer in self._inputs.items():
            self._binding.bind_ortvalue_input(name, buffer.value)
        for name, buffer in self._outputs.items():
            self._binding.bind_ortvalue_output(name, buffer.value)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for name, buffer in self._inputs.items():
            buffer.write(inputs[name])
        self._session.run_with_iobinding(self._binding, self._options)
        return {name: buffer.read() for name, buffer in self._outputs.items()}


class BoundEngine(ONNXRuntimeEngine):
    """A program in a session whose inputs and outputs lie in buffers on the device.

    Buffers are made once for each batch size, so addresses stay and CUDA graphs can be replayed.

    Args:
        session: ONNX Runtime session of the program.
        program: Its declaration.
        dimensions: Sizes of the bundle's fixed axes.
        device: ONNX Runtime's name and number of the device.
        cuda_graphs: Whether the session captures its calls.
    """

    def __init__(
        self,
        session: Any,
        program: ProgramSpec,
        dimensions: Dimensions,
        device: tuple[str, int],
        *,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__(session, program, dimensions)
        self._device, self._cuda_graphs = device, cuda_graphs
        # Calls without buffers of their own, and loops, must not be captured.
        self._run_options = self._options(_NO_GRAPH)
        self._lock = threading.RLock()
        # A session that captures must not be called by two threads at once.
        self._turn: AbstractContextManager[Any] = self._lock if cuda_graphs else nullcontext()
        self._numbers = itertools.count(1)
        self._free: OrderedDict[int, _Binding] = OrderedDict()
        self._bindable = all(
            x.type in ("tensor(float)", "tensor(int64)")
            for x in (*session.get_inputs(), *session.get_outputs())
        )

    def run(self, **inputs: Array) -> dict[str, Array]:
        """Execute the program once; see `Engine.run`."""
        session = self._session
        # Interfaces of other types are cast on the host, by ordinary calls.
        if session is None or not self._bindable:
            with self._turn:
                return super().run(**inputs)
        rows = check_inputs(self.program, inputs, self._dimensions)
        try:
            with self._turn:
                binding = self._take(session, rows)
                outputs = binding.run(inputs)
                self._give(rows, binding)
        except Exception as error:  # ONNX Runtime's classes share no public base
            raise EngineError(f"program '{self.program.name}' failed: {error}") from error
        return outputs

    def loop(self, rows: int, carry: Carry) -> Loop:
        """A loop whose tensors stay on the device; see `LoopingEngine`."""
        if self._session is None:
            raise EngineError(f"the engine of program '{self.program.name}' is closed")
        return BoundLoop(
            [(self._session, self.program)],
            self._dimensions,
            rows,
            {self.program.name: carry},
            self._device,
            self._run_options,
            {self.program.name: self._turn},
        )

    def join(
        self, others: Sequence[Engine], rows: int, carries: Mapping[str, Carry]
    ) -> WholeLoop | None:
        """A loop over several sessions of one device; see `JoiningEngine.join`."""
        engines = [self, *(e for e in others if isinstance(e, BoundEngine))]
        if len(engines) <= len(others) or any(not e._bindable for e in engines):
            return None
        sessions = [(e._session, e.program) for e in engines]
        if any(session is None for session, _ in sessions):
            raise EngineError("an engine of a loop is closed")
        return BoundWholeLoop(
            sessions,
            self._dimensions,
            rows,
            carries,
            self._device,
            self._run_options,
            {e.program.name: e._turn for e in engines},
        )

    def close(self) -> None:
        """Free the session, its weights and all buffers."""
        super().close()
        with self._lock:
            self._free.clear()

    def _take(self, session: Any, rows: int) -> _Binding:
        """Buffers that no other call uses; concurrent calls get their own."""
        with self._lock:
            binding = self._free.pop(rows, None)
            # A captured call holds the addresses of one binding: no other may share its number.
            number = next(self._numbers)
        if binding is None:
            options = self._options(number)
            binding = _Binding(session, self.program, self._dimensions, rows, self._device, options)
        return binding

    def _give(self, rows: int, binding: _Binding) -> None:
        with self._lock:
            self._free[rows] = binding
            while len(self._free) > _KEPT_BINDINGS:
                self._free.popitem(last=False)

    def _options(self, graph: int) -> Any:
        if not self._cuda_graphs:
            return None
        import onnxruntime as ort

        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options


class ONNXRuntimeCUDA:
    """One of ONNX Runtime's providers for NVIDIA GPUs.

    Args:
        threads: CPU threads for what stays on the host.
        provider: `cuda` runs any bundle; `tensorrt` and `tensorrt-rtx` compile what they can when
            a program is loaded, and leave the rest to `cuda`.
        device: Number of the GPU.
        cuda_graphs: Capture every program once a batch size and replay it. Concurrent calls of one
            program then wait for each other. Loops are not captured.
        cache: Folder in which the compiling providers keep what they compiled.
        options: Further options of the provider, by its own names; they win.

    Raises:
        OptionError: An argument is out of range.
    """

    def __init__(
        self,
        threads: int | None = None,
        *,
        provider: Provider = "cuda",
        device: int = 0,
        cuda_graphs: bool = False,
        cache: str | PathLike[str] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        problems = []
        if threads is not None and threads < 1:
            problems.append(f"threads: received {threads}, expected at least 1")
        if provider not in PROVIDERS:
            problems.append(f"provider: received {provider!r}, expected one of {list(PROVIDERS)}")
        if device < 0:
            problems.append(f"device: received {device}, expected at least 0")
        if problems:
            raise OptionError("; ".join(problems))
        self.threads, self.provider, self.cuda_graphs = threads, provider, cuda_graphs
        self._ordinal, self._cache = device, cache
        self._extra = dict(options or {})
        self._device: tuple[str, int] = ("cuda", device)
        self._find_gpu: Callable[[int], str | None] = present_target

    @property
    def name(self) -> str:
        """`onnxruntime-cuda`, whichever provider it is."""
        return "onnxruntime-cuda"

    @property
    def takes_loops(self) -> bool:
        """True: tensors stay on the device from call to call."""
        return True

    def available(self) -> Availability:
        """Whether ONNX Runtime brings the provider and a GPU is here."""
        state = installed(_INSTALL)
        if not state:
            return state
        import onnxruntime as ort

        wanted = PROVIDERS[self.provider]
        if wanted not in ort.get_available_providers():
            return Availability(False, f"{state.why} is built without {wanted}: {_INSTALL}")
        target = self._find_gpu(self._ordinal)
        if target is None:
            return Availability(False, f"{state.why}, but no NVIDIA GPU or driver was found")
        return Availability(True, f"{state.why}, {wanted} on {target}")

    def providers(self) -> list[str | tuple[str, dict[str, str]]]:
        """What ONNX Runtime is asked for: the provider and those that take what it leaves."""
        cuda = {
            "device_id": str(self._ordinal),
            # Weights and activations stay float32 where the program says so.
            "use_tf32": "0",
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
        }
        own: dict[str, str] = {"device_id": str(self._ordinal)}
        if self.provider == "cuda":
            own = cuda
        elif self._cache is not None and self.provider == "tensorrt":
            own |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": fspath(self._cache)}
            own |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": fspath(self._cache)}
        elif self._cache is not None:
            own |= {"nv_runtime_cache_path": fspath(self._cache)}
        if self.cuda_graphs:
            own[_GRAPH_OPTION[self.provider]] = "1"
        chain: list[str | tuple[str, dict[str, str]]] = [
            (PROVIDERS[self.provider], own | self._extra)
        ]
        if self.provider != "cuda":
            chain.append((PROVIDERS["cuda"], cuda))
        return [*chain, "CPUExecutionProvider"]

    def load(self, bundle: Bundle, program: str) -> Engine:
        """Create the session of one program; see `Backend.load`."""
        session, spec = open_session(
            bundle,
            program,
            lambda: session_options(self.threads),
            self.providers(),
            self.name,
            _INSTALL,
        )
        wanted, received = PROVIDERS[self.provider], session.get_providers()
        if wanted not in received:
            # ONNX Runtime only logs that a provider's libraries are missing and uses the CPU.
            raise EngineError(
                f"program '{program}' runs on {received} instead of {wanted}: the libraries of "
                "CUDA, cuDNN or TensorRT that this ONNX Runtime needs were not found"
            )
        return BoundEngine(
            session, spec, bundle.dimensions, self._device, cuda_graphs=self.cuda_graphs
        )
