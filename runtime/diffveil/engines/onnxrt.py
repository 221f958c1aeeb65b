"""Execution with ONNX Runtime on the CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from diffveil.bundle import Bundle
from diffveil.engines._base import Array, Availability, Engine
from diffveil.engines._loop import Carry, Loop
from diffveil.engines.bound import BoundLoop
from diffveil.errors import BackendUnavailableError, EngineError, OptionError
from diffveil.programs import ALL_PROGRAMS, Dimensions, ProgramSpec, check_inputs

__all__ = [
    "ONNXRuntimeCPU",
    "ONNXRuntimeEngine",
    "installed",
    "open_session",
    "session_options",
]

_INSTALL = "pip install 'diffveil[cpu]'"
_log = logging.getLogger(__name__)


class ONNXRuntimeEngine:
    """A program in an ONNX Runtime session. Outputs are fresh arrays, never views of buffers."""

    def __init__(self, session: Any, program: ProgramSpec, dimensions: Dimensions) -> None:
        self._session: Any = session
        self._run_options: Any = None
        self._program = program
        self._dimensions = dimensions
        types = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
        self._dtypes = {
            i.name: np.dtype(types.get(i.type, "float32")) for i in session.get_inputs()
        }
        wanted = [t.name for t in program.inputs]
        outputs = {o.name for o in session.get_outputs()}
        # An unused input may have been dropped from a graph, but nothing unknown may be there.
        if not set(self._dtypes) <= set(wanted) or outputs != {t.name for t in program.outputs}:
            raise EngineError(
                f"program '{program.name}': received a graph with inputs {sorted(self._dtypes)} "
                f"and outputs {sorted(outputs)}, expected {wanted} and "
                f"{[t.name for t in program.outputs]}; export the bundle again"
            )

    @property
    def program(self) -> ProgramSpec:
        """The program that this engine executes."""
        return self._program

    def run(self, **inputs: Array) -> dict[str, Array]:
        """Execute the program once; see `Engine.run`."""
        session = self._session
        if session is None:
            raise EngineError(f"the engine of program '{self._program.name}' is closed")
        check_inputs(self._program, inputs, self._dimensions)
        feed = {
            name: np.ascontiguousarray(inputs[name], dtype=dtype)
            for name, dtype in self._dtypes.items()
        }
        names = [t.name for t in self._program.outputs]
        try:
            values = session.run(names, feed, self._run_options)
        except Exception as error:  # ONNX Runtime's classes share no public base
            raise EngineError(f"program '{self._program.name}' failed: {error}") from error
        return {
            t.name: value.astype(t.dtype, copy=False)
            for t, value in zip(self._program.outputs, values, strict=True)
        }

    def loop(self, rows: int, carry: Carry) -> Loop:
        """A loop whose tensors stay in buffers of its own; see `LoopingEngine`."""
        if self._session is None:
            raise EngineError(f"the engine of program '{self._program.name}' is closed")
        return BoundLoop(
            [(self._session, self._program)], self._dimensions, rows, {self._program.name: carry}
        )

    def close(self) -> None:
        """Free the session and its weights."""
        self._session = None


class ONNXRuntimeCPU:
    """ONNX Runtime's CPU provider.

    Args:
        threads: Threads of one call; by default the CPUs that this process may use.

    Raises:
        OptionError: `threads` is below one.
    """

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise OptionError(f"threads: received {threads}, expected at least 1")
        self.threads = threads

    @property
    def name(self) -> str:
        """`cpu`."""
        return "cpu"

    def available(self) -> Availability:
        """Whether ONNX Runtime is installed."""
        return installed(_INSTALL)

    def load(self, bundle: Bundle, program: str) -> Engine:
        """Create the session of one program; see `Backend.load`."""
        session, spec = open_session(
            bundle, program, self.options, ["CPUExecutionProvider"], self.name, _INSTALL
        )
        return ONNXRuntimeEngine(session, spec, bundle.dimensions)

    def options(self) -> Any:
        """ONNX Runtime's `SessionOptions` for every program."""
        return session_options(self.threads)


def installed(install: str) -> Availability:
    """Whether ONNX Runtime is installed, and its version.

    Args:
        install: How to install it.
    """
    if find_spec("onnxruntime") is None:
        return Availability(False, f"onnxruntime is not installed: {install}")
    try:
        import onnxruntime
    except ImportError as error:
        return Availability(False, f"onnxruntime cannot be imported ({error}): {install}")
    return Availability(True, f"onnxruntime {onnxruntime.__version__}")


def open_session(
    bundle: Bundle,
    program: str,
    options: Callable[[], Any],
    providers: Sequence[Any],
    backend: str,
    install: str,
) -> tuple[Any, ProgramSpec]:
    """Create an ONNX Runtime session of one program.

    Args:
        bundle: The bundle.
        program: The program.
        options: Makes ONNX Runtime's `SessionOptions`.
        providers: Execution providers as ONNX Runtime takes them.
        backend: Name of the backend, for messages.
        install: How to install it, for messages.

    Returns:
        The session and the program's declaration.

    Raises:
        BackendUnavailableError: ONNX Runtime is not installed.
        BundleCorruptError: A file of the program differs from its hash.
        EngineError: ONNX Runtime refuses the program.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend '{backend}' needs onnxruntime: {install}"
        ) from error
    path = bundle.program_path(program)
    try:
        session = ort.InferenceSession(
            os.fspath(path), sess_options=options(), providers=list(providers)
        )
    except Exception as error:  # ONNX Runtime's classes share no public base
        hint = ""
        if bundle.program(program).precision == "bfloat16":
            hint = (
                "; it computes in bfloat16, for which ONNX Runtime has few CPU kernels: run it "
                "on a GPU, or export the model in float32 or float16"
            )
        raise EngineError(f"program '{program}' cannot be loaded: {error}{hint}") from error
    _log.debug("loaded program %s of %s on %s", program, bundle.name, backend)
    return session, ALL_PROGRAMS[program]


def session_options(threads: int | None) -> Any:
    """ONNX Runtime's `SessionOptions` for every program.

    Args:
        threads: CPU threads of a call; None: the CPUs that this process may use.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or _usable_cpus()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: warnings speak to graph authors
    # The arena keeps the largest batch ever seen, for each program: hundreds of megabytes.
    options.enable_cpu_mem_arena = False
    # Weights are stored in few bits to keep bundles small, and computed with in fp32: without
    # this ONNX Runtime would keep DequantizeLinear nodes and run them every call.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Threads that spin between calls steal the CPU from the application around us.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _usable_cpus() -> int:
    """CPUs that this process may run on; ONNX Runtime's own default ignores container limits."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
