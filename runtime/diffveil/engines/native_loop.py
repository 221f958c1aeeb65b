"""A loop of TensorRT engines: nothing waits in it, and all of it becomes one graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from diffveil.engines._base import Array
from diffveil.engines._cuda import Graph, Memory, Stream, aligned
from diffveil.engines._execution import Execution
from diffveil.engines._loop import Carry, Scheduled, check_put, joined, lacking
from diffveil.errors import EngineError
from diffveil.programs import ProgramSpec

__all__ = ["Member", "NativeLoop"]

_KEPT_GRAPHS = 4
_MOST_CAPTURED = 256
"""Calls of a loop that becomes a graph: each adds its network's kernels, and graphs take memory."""
_Pattern: TypeAlias = tuple[tuple[str, tuple[int, ...], int], ...]


class Member:
    """A program that takes part in a loop.

    Args:
        program: Its declaration.
        execution: Runs its engine; all members' on one lane.

    Raises:
        EngineError: A tensor of the engine is not of the dtype that the program declares.
    """

    def __init__(self, program: ProgramSpec, execution: Execution) -> None:
        self.program, self.execution = program, execution
        self.inputs, self.outputs = (frozenset(t) for t in execution.tensors)
        declared = {t.name: t.dtype for t in (*program.inputs, *program.outputs)}
        types = {**execution.tensors[0], **execution.tensors[1]}
        odd = [name for name, dtype in types.items() if declared[name] != dtype]
        if odd:
            raise EngineError(f"program '{program.name}' cannot be bound: odd dtype of {odd}")


class NativeLoop:
    """Owns a buffer for each tensor of its programs, and graphs of whole loops over them.

    A chain of `carries` is a ring: after a call the output's buffer becomes the first input's, that
    one the next input's, and the last one takes the next output. So nothing moves but addresses.

    Args:
        members: The programs, at least one.
        shapes: Shape of every tensor.
        carries: How outputs of a program become inputs, by program.
        graphs: Whether to capture graphs.
    """

    def __init__(
        self,
        members: Sequence[Member],
        shapes: Mapping[str, tuple[int, ...]],
        carries: Mapping[str, Carry],
        *,
        graphs: bool,
    ) -> None:
        self._members = {m.program.name: m for m in members}
        self._program = joined([m.program for m in members])
        self._carries, self._shapes = carries, shapes
        tensors = {t.name: t for t in (*self._program.inputs, *self._program.outputs)}
        self._dtypes = {name: np.dtype(t.dtype) for name, t in tensors.items()}
        self._carried = {n for carry in carries.values() for chain in carry for n in chain[1:]}
        self._graphs_wanted = graphs
        self._lane = members[0].execution.lane
        self._home = {name: self._lane.device.memory(self._bytes(name)) for name in tensors}
        self._slots: dict[str, Memory] = {}
        self._graphs: dict[tuple[tuple[str, ...], int, _Pattern], Graph | None] = {}
        self._at: dict[str, Memory] = {}
        self._results: dict[str, Memory] = {}
        self._known: set[str] = set()
        self._finished = False
        self._done: Callable[[NativeLoop], None] | None = None

    def begin(self, done: Callable[[NativeLoop], None]) -> None:
        """Forget what was put; `done` is told when the loop is closed."""
        self._done = done
        self._reset(set())

    def put(self, **inputs: Array) -> None:
        """See `Loop.put`."""
        check_put(self._program, inputs, self._shapes)
        if self._finished:
            self._reset(self._known - self._carried)
        for name, array in inputs.items():
            self._at[name].upload(array, self._stream)
        self._known |= inputs.keys()

    def step(self) -> None:
        """See `Loop.step`; the loop has but one program."""
        (name,) = self._members
        self._require((name,), ())
        self._prepare()
        self._call(name, {})

    def run(self, schedule: Mapping[str, Scheduled], calls: Sequence[str]) -> None:
        """See `WholeLoop.run`."""
        self._require(calls, schedule)
        self._upload(schedule)
        pattern = tuple(
            (name, s.order, self._slots[name].address) for name, s in sorted(schedule.items())
        )
        key = tuple(calls), self._prepare(), pattern
        graph = self._graphs.get(key)
        if graph is not None:
            graph.launch(self._stream)
            for name in calls:
                self._rotate(name)
        elif key in self._graphs and len(calls) <= _MOST_CAPTURED and self._capturable:
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
        """See `WholeLoop.get`; the one place that waits for the device."""
        memory = self._results.get(output)
        if memory is None and output in self._carried and self._results:
            memory = self._at[output]
        if memory is None:
            raise EngineError(f"'{output}' is no output of a call that was made")
        array = np.empty(self._shapes[output], self._dtypes[output])
        memory.download(array, self._stream)
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
        return self._lane.stream

    @property
    def _capturable(self) -> bool:
        return all(m.execution.capturable for m in self._members.values())

    def _prepare(self) -> int:
        """Give all members the lane's activation memory, as the largest needs it; its address."""
        executions = [m.execution for m in self._members.values()]
        most = max(e.scratch_bytes for e in executions)
        return [e.scratch(most) for e in executions][-1]

    def _reset(self, known: set[str]) -> None:
        self._at = dict(self._home)
        self._results, self._known, self._finished = {}, known, False

    def _require(self, calls: Sequence[str], schedule: Collection[str]) -> None:
        known = self._known - self._carried if self._finished else self._known
        programs = {name: (m.inputs, m.outputs) for name, m in self._members.items()}
        missing = lacking(programs, self._carries, calls, (*known, *schedule))
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
                slots = self._slots[name] = self._lane.device.memory(size)
            for position, value in enumerate(scheduled.values):
                slots.upload(value, self._stream, position * stride)

    def _calls(self, schedule: Mapping[str, Scheduled], calls: Sequence[str]) -> None:
        for index, program in enumerate(calls):
            taken = {n: s for n, s in schedule.items() if n in self._members[program].inputs}
            self._call(
                program,
                {
                    name: self._slots[name].address + s.order[index] * aligned(self._bytes(name))
                    for name, s in taken.items()
                },
            )

    def _call(self, program: str, elsewhere: Mapping[str, int]) -> None:
        member = self._members[program]
        for name in member.inputs | member.outputs:
            member.execution.bind(name, elsewhere.get(name, self._at[name].address))
        member.execution.enqueue()
        self._rotate(program)

    def _rotate(self, program: str) -> None:
        self._results |= {name: self._at[name] for name in self._members[program].outputs}
        for chain in self._carries.get(program, ()):
            ring = [self._at[name] for name in chain]
            self._at.update(zip(chain, (ring[-1], *ring[:-1]), strict=True))
