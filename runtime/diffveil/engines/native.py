"""A TensorRT engine in execution: its contexts, buffers and captured graphs in one owner."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffveil.engines._base import Array, Engine
from diffveil.engines._cuda import Graph, Memory, Pinned
from diffveil.engines._execution import Execution
from diffveil.engines._kernel_cache import KernelCache
from diffveil.engines._lanes import Lane, Lanes
from diffveil.engines._loop import Carry
from diffveil.engines.bound import shape_of
from diffveil.engines.native_loop import Member, NativeLoop
from diffveil.engines.records import EngineRecord
from diffveil.errors import EngineError
from diffveil.programs import Dimensions, ProgramSpec, check_inputs

__all__ = ["NativeEngine"]

_KEPT = 4
"""Batch sizes, on all lanes together, for which an engine keeps buffers and graphs."""


class _Bound:
    """A program's buffers on the device and on the host for one batch size on one lane."""

    def __init__(
        self, execution: Execution, record: EngineRecord, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._execution, self._record = execution, record
        self._graph: Graph | None = None
        self._scratch: int | None = None
        device = execution.lane.device
        self._host: dict[str, Pinned] = {}
        self._memory: dict[str, Memory] = {}
        for name, dtype in (*record.inputs.items(), *record.outputs.items()):
            self._host[name] = device.pinned(shapes[name], dtype)
            self._memory[name] = device.memory(self._host[name].array.nbytes)
            execution.bind(name, self._memory[name].address)

    def run(self, inputs: Mapping[str, Array], graphs: bool) -> dict[str, Array]:
        stream = self._execution.lane.stream
        for name in self._record.inputs:
            np.copyto(self._host[name].array, inputs[name], casting="same_kind")
        scratch = self._execution.scratch()
        if scratch != self._scratch:
            # First call, or a graph that would write to memory that is another's now.
            self._graph, self._scratch = None, scratch
            self._enqueue()
        elif self._graph is None and graphs and self._execution.capturable:
            with stream.capture() as made:
                self._enqueue()
            (self._graph,) = made
            self._graph.launch(stream)
        elif self._graph is not None:
            self._graph.launch(stream)
        else:
            self._enqueue()
        stream.wait()
        return {name: np.array(self._host[name].array) for name in self._record.outputs}

    def _enqueue(self) -> None:
        stream = self._execution.lane.stream
        for name in self._record.inputs:
            self._memory[name].upload(self._host[name].array, stream)
        self._execution.enqueue()
        for name in self._record.outputs:
            self._memory[name].download(self._host[name].array, stream)


class NativeEngine:
    """A program as a TensorRT or TensorRT-RTX engine.

    Inputs and outputs go through page-locked memory. The first call at a batch size warms up, the
    second captures copies and execution as one CUDA graph, later ones replay it and wait once.

    Args:
        trt: Module of the library.
        engine: Its deserialised engine.
        record: How it was built.
        program: Declaration of the program.
        dimensions: Sizes of the bundle's fixed axes.
        lanes: Streams and memory that all engines of the backend share.
        graphs: Whether to capture graphs.
        kernels: Where the library's compiled kernels are kept between processes.

    Raises:
        EngineError: Tensors of the engine are not those of the program.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        record: EngineRecord,
        program: ProgramSpec,
        dimensions: Dimensions,
        lanes: Lanes,
        *,
        graphs: bool = True,
        kernels: KernelCache | None = None,
    ) -> None:
        wanted = {t.name for t in program.inputs}, {t.name for t in program.outputs}
        if not record.inputs.keys() <= wanted[0] or record.outputs.keys() != wanted[1]:
            raise EngineError(
                f"program '{program.name}': the engine has inputs {sorted(record.inputs)} and "
                f"outputs {sorted(record.outputs)}, expected {sorted(wanted[0])} and "
                f"{sorted(wanted[1])}; build it again"
            )
        odd = sorted({*record.inputs.values(), *record.outputs.values()} - _HOST_TYPES)
        if odd:
            raise EngineError(f"program '{program.name}': NumPy has no {', '.join(odd)}")
        self._trt, self._engine, self._record = trt, engine, record
        self._program, self._dimensions = program, dimensions
        self._lanes, self._graphs, self._kernels = lanes, graphs, kernels
        self._lock = threading.Lock()
        self._bound: OrderedDict[tuple[int, int], _Bound] = OrderedDict()

    @property
    def program(self) -> ProgramSpec:
        """The program that this engine executes."""
        return self._program

    @property
    def batches(self) -> tuple[int, int]:
        """Fewest and most rows of one call, as the engine was built."""
        return next(iter(self._record.profile.values())).min[0], self._record.max_batch

    def run(self, **inputs: Array) -> dict[str, Array]:
        """Execute the program once; see `Engine.run`."""
        rows = check_inputs(self._program, inputs, self._dimensions)
        shapes = self._shapes(rows)
        with self._lanes.borrowed() as lane:
            key = id(lane), rows
            with self._lock:
                bound = self._bound.pop(key, None)
            if bound is None:
                bound = _Bound(self._execution(shapes, lane), self._record, shapes)
            outputs = bound.run(inputs, self._graphs)
            self._save_kernels()
            self._keep(key, bound)
        return {t.name: outputs[t.name].astype(t.dtype, copy=False) for t in self._program.outputs}

    def loop(self, rows: int, carry: Carry) -> NativeLoop:
        """A loop whose tensors stay on the device; close it when its result has been read."""
        return self._loop([self], rows, {self._program.name: carry})

    def join(
        self, others: Sequence[Engine], rows: int, carries: Mapping[str, Carry]
    ) -> NativeLoop | None:
        """A loop over several engines of one device; see `JoiningEngine.join`."""
        engines = [self, *(e for e in others if isinstance(e, NativeEngine))]
        if len(engines) <= len(others) or any(e._lanes is not self._lanes for e in engines):
            return None
        return self._loop(engines, rows, carries)

    def _loop(
        self, engines: Sequence[NativeEngine], rows: int, carries: Mapping[str, Carry]
    ) -> NativeLoop:
        shapes = {name: shape for e in engines for name, shape in e._shapes(rows).items()}
        lane = self._lanes.take()
        try:
            names = tuple(e._program.name for e in engines)
            key = id(lane), rows, names, _hashable(carries)
            loop: NativeLoop | None = self._lanes.loops.take(key, engines)
            if loop is None:
                members = [Member(e._program, e._execution(e._shapes(rows), lane)) for e in engines]
                loop = NativeLoop(members, shapes, carries, graphs=self._graphs)

            def done(loop: NativeLoop) -> None:
                try:
                    for engine in engines:
                        engine._save_kernels()
                    if all(e._engine is not None for e in engines):
                        self._lanes.loops.keep(key, loop, engines)
                finally:  # a lane that is not given back is waited for without limit
                    self._lanes.give(lane)

            loop.begin(done)
        except BaseException:
            self._lanes.give(lane)
            raise
        return loop

    def close(self) -> None:
        """Free the engine's weights, buffers and graphs once no call uses them."""
        with self._lock:
            self._engine = None
            self._bound.clear()
        self._lanes.loops.forget(self)

    def _save_kernels(self) -> None:
        """Keep what the library has compiled since; costs nothing where it has not."""
        if self._kernels is not None:
            self._kernels.save()

    def _keep(self, key: tuple[int, int], bound: _Bound) -> None:
        with self._lock:
            if self._engine is None:
                return
            self._bound[key] = bound
            while len(self._bound) > _KEPT:
                self._bound.popitem(last=False)

    def _execution(self, shapes: Mapping[str, tuple[int, ...]], lane: Lane) -> Execution:
        engine = self._engine
        if engine is None:
            raise EngineError(f"the engine of program '{self._program.name}' is closed")
        return Execution(self._trt, engine, self._record, shapes, lane, self._kernels)

    def _shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a call with that many rows.

        Raises:
            EngineError: The engine was not built for so many, or it is closed.
        """
        if self._engine is None:
            raise EngineError(f"the engine of program '{self._program.name}' is closed")
        least, most = self.batches
        if not least <= rows <= most:
            raise EngineError(
                f"the engine of program '{self._program.name}' takes {least} to {most} rows, "
                f"received {rows}; build it with another --batch"
            )
        tensors = (*self._program.inputs, *self._program.outputs)
        return {t.name: shape_of(t, self._dimensions, rows) for t in tensors}


def _hashable(carries: Mapping[str, Carry]) -> tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]:
    """What a loop carries over, as part of a key."""
    return tuple((name, tuple(map(tuple, carry))) for name, carry in sorted(carries.items()))


_HOST_TYPES = frozenset({"float32", "float16", "int64", "int32"})
