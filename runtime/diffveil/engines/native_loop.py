"""A loop of a TensorRT engine: nothing waits in it, and all of it becomes one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from diffveil.engines._base import Array
from diffveil.engines._cuda import Graph, Memory, Stream, aligned
from diffveil.engines._execution import Execution
from diffveil.engines._loop import Carry, Scheduled, check_put
from diffveil.engines.records import EngineRecord
from diffveil.errors import EngineError
from diffveil.programs import ProgramSpec

__all__ = ["NativeLoop"]

_KEPT_GRAPHS = 4
_Pattern: TypeAlias = tuple[tuple[str, tuple[int, ...], int], ...]


class NativeLoop:
    """Owns a buffer for each tensor of a program, and graphs of whole loops over them.

    A chain of `carry` is a ring: after a call the output's buffer becomes the first input's, that
    one the next input's, and the last one takes the next output. So nothing moves but addresses.

    Args:
        execution: Runs the engine.
        record: How it was built.
        program: Declaration of the program.
        shapes: Shape of every tensor.
        carry: How outputs become inputs.
        graphs: Whether to capture graphs.

    Raises:
        EngineError: A tensor of the engine is not of the dtype that the program declares.
    """

    def __init__(
        self,
        execution: Execution,
        record: EngineRecord,
        program: ProgramSpec,
        shapes: Mapping[str, tuple[int, ...]],
        carry: Carry,
        *,
        graphs: bool,
    ) -> None:
        tensors = {t.name: t for t in (*program.inputs, *program.outputs)}
        types = {**record.inputs, **record.outputs}
        odd = [name for name, dtype in types.items() if tensors[name].dtype != dtype]
        if odd:
            raise EngineError(f"program '{program.name}' cannot be bound: odd dtype of {odd}")
        self._execution, self._program, self._carry = execution, program, carry
        self._shapes, self._used = shapes, set(types)
        self._dtypes = {name: np.dtype(t.dtype) for name, t in tensors.items()}
        self._graphs_wanted = graphs
        device = execution.lane.device
        self._home = {name: device.memory(self._bytes(name)) for name in tensors}
        self._slots: dict[str, Memory] = {}
        self._graphs: dict[tuple[int, int, _Pattern], Graph | None] = {}
        self._at: dict[str, Memory] = {}
        self._results: dict[str, Memory] = {}
        self._missing: set[str] = set()
        self._finished = False
        self._done: Callable[[NativeLoop], None] | None = None

    def begin(self, done: Callable[[NativeLoop], None]) -> None:
        """Forget what was put; `done` is told when the loop is closed."""
        self._done = done
        self._reset({t.name for t in self._program.inputs} & self._used)

    def put(self, **inputs: Array) -> None:
        """See `Loop.put`."""
        check_put(self._program, inputs, self._shapes)
        if self._finished:
            carried = {name for chain in self._carry for name in chain[1:]}
            self._reset(self._missing | (carried & self._used))
        for name, array in inputs.items():
            self._at[name].upload(array, self._stream)
        self._missing -= inputs.keys()

    def step(self) -> None:
        """See `Loop.step`."""
        self._require(self._missing)
        self._execution.scratch()
        self._call({})

    def run(self, schedule: Mapping[str, Scheduled], calls: int) -> None:
        """See `WholeLoop.run`."""
        self._require(self._missing - schedule.keys())
        if self._finished:
            self._require({name for chain in self._carry for name in chain[1:]} & self._used)
        self._upload(schedule)
        pattern = tuple(
            (name, s.order, self._slots[name].address) for name, s in sorted(schedule.items())
        )
        key = calls, self._execution.scratch(), pattern
        graph = self._graphs.get(key)
        if graph is not None:
            graph.launch(self._stream)
            for _ in range(calls):
                self._rotate()
        elif key in self._graphs and self._execution.capturable:
            with self._stream.capture() as made:
                self._calls(schedule, calls)
            (graph,) = made
            graph.launch(self._stream)
            self._graphs[key] = graph
        else:
            # The first time warms up, and may stay the only one.
            self._calls(schedule, calls)
            if self._graphs_wanted:
                self._graphs[key] = None
                while len(self._graphs) > _KEPT_GRAPHS:
                    del self._graphs[next(iter(self._graphs))]
        self._finished = True

    def get(self, output: str) -> Array:
        """See `Loop.get`; the one place that waits for the device."""
        if output not in self._results:
            raise EngineError(f"'{output}' is no output of a call that was made")
        array = np.empty(self._shapes[output], self._dtypes[output])
        self._results[output].download(array, self._stream)
        self._stream.wait()
        return array

    def close(self) -> None:
        """Give the stream and the buffers back; nothing else may be called after this."""
        done, self._done = self._done, None
        if done is not None:
            try:
                self._stream.wait()
            finally:
                done(self)

    @property
    def _stream(self) -> Stream:
        return self._execution.lane.stream

    def _reset(self, missing: set[str]) -> None:
        self._at = dict(self._home)
        self._results, self._missing, self._finished = {}, set(missing), False

    def _require(self, missing: set[str]) -> None:
        if missing:
            raise EngineError(f"a loop of program '{self._program.name}' lacks {sorted(missing)}")

    def _bytes(self, name: str) -> int:
        return int(np.prod(self._shapes[name], dtype=np.int64)) * self._dtypes[name].itemsize

    def _upload(self, schedule: Mapping[str, Scheduled]) -> None:
        """Put all values of all calls onto the device, before the first call."""
        for name, scheduled in schedule.items():
            for value in scheduled.values:
                check_put(self._program, {name: value}, self._shapes)
            stride = aligned(self._bytes(name))
            size = stride * len(scheduled.values)
            slots = self._slots.get(name)
            if slots is None or slots.size < size:
                self._stream.wait()
                # Graphs hold the old address.
                self._graphs.clear()
                slots = self._slots[name] = self._execution.lane.device.memory(size)
            for position, value in enumerate(scheduled.values):
                slots.upload(value, self._stream, position * stride)

    def _calls(self, schedule: Mapping[str, Scheduled], calls: int) -> None:
        for index in range(calls):
            self._call(
                {
                    name: self._slots[name].address + s.order[index] * aligned(self._bytes(name))
                    for name, s in schedule.items()
                }
            )

    def _call(self, elsewhere: Mapping[str, int]) -> None:
        for name in self._used:
            self._execution.bind(name, elsewhere.get(name, self._at[name].address))
        self._execution.enqueue()
        self._rotate()

    def _rotate(self) -> None:
        self._results = {t.name: self._at[t.name] for t in self._program.outputs}
        for chain in self._carry:
            ring = [self._at[name] for name in chain]
            self._at.update(zip(chain, (ring[-1], *ring[:-1]), strict=True))
