"""A loop in ONNX Runtime on buffers of its own: allocated once, rotated between calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from diffveil.engines._base import Array
from diffveil.engines._loop import Carry, Scheduled, check_put, joined, lacking
from diffveil.errors import EngineError
from diffveil.programs import Dimensions, ProgramSpec, TensorSpec

__all__ = ["CPU", "BoundLoop", "BoundWholeLoop", "DeviceBuffer", "shape_of"]


CPU: tuple[str, int] = ("cpu", 0)
"""ONNX Runtime's name and number of the host as a device."""


class DeviceBuffer:
    """A tensor's memory on a device, and ONNX Runtime's view of it.

    Args:
        shape: Its shape.
        dtype: NumPy name of its dtype.
        device: ONNX Runtime's name and number of the device.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, device: tuple[str, int] = CPU) -> None:
        from onnxruntime import OrtValue

        self.shape = shape
        self._array: Array | None = None
        if device == CPU:
            # Shares the array's memory, so writing to the array is all of the copying.
            self._array = np.zeros(shape, dtype=dtype)
            self.value: Any = OrtValue.ortvalue_from_numpy(self._array)
        else:
            self.value = OrtValue.ortvalue_from_shape_and_type(
                list(shape), np.dtype(dtype), *device
            )

    def write(self, array: Array) -> None:
        """Copy an array of the buffer's shape and dtype into it."""
        if self._array is not None:
            np.copyto(self._array, array)
        else:
            self.value.update_inplace(np.ascontiguousarray(array))

    def read(self) -> Array:
        """A copy of what it holds."""
        return np.array(self._array if self._array is not None else self.value.numpy())


class BoundLoop:
    """Owns one buffer a tensor of its programs, and the bindings of their sessions to them.

    A chain of `carries` is a ring: after a call the output's buffer becomes the first input's, that
    one the next input's, and the last one takes the next output. So nothing moves but names.

    Args:
        sessions: ONNX Runtime's session of each program, with the program's declaration.
        dimensions: Sizes of the bundle's fixed axes.
        rows: Size of the dynamic axis.
        carries: How outputs of a program become inputs, by program.
        device: Where the buffers lie, as ONNX Runtime names it.
        options: ONNX Runtime's `RunOptions` of every call.
        turns: What a call of a program must hold, by program, where sessions take one at a time.

    Raises:
        EngineError: A graph's tensor is not of the dtype that the program declares.
    """

    def __init__(
        self,
        sessions: Sequence[tuple[Any, ProgramSpec]],
        dimensions: Dimensions,
        rows: int,
        carries: Mapping[str, Carry],
        device: tuple[str, int] = CPU,
        options: Any = None,
        turns: Mapping[str, AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._options, self._carries, self._turns = options, carries, turns or {}
        self._sessions = {program.name: session for session, program in sessions}
        self._program = joined([program for _, program in sessions])
        self._names = {
            program.name: _bindable_names(session, program) for session, program in sessions
        }
        self._buffers = {
            t.name: DeviceBuffer(shape_of(t, dimensions, rows), t.dtype, device)
            for t in (*self._program.inputs, *self._program.outputs)
        }
        self._carried = {n for carry in carries.values() for chain in carry for n in chain[1:]}
        self._results: dict[str, DeviceBuffer] = {}
        self._known: set[str] = set()
        self._bindings = {name: session.io_binding() for name, session in self._sessions.items()}
        for name in self._buffers:
            self._bind(name)

    def put(self, **inputs: Array) -> None:
        """See `Loop.put`."""
        shapes = {name: buffer.shape for name, buffer in self._buffers.items()}
        check_put(self._program, inputs, shapes)
        for name, array in inputs.items():
            self._buffers[name].write(array)
        self._known |= inputs.keys()

    def step(self) -> None:
        """See `Loop.step`; the loop has but one program."""
        (name,) = self._sessions
        self._require((name,), ())
        self._call(name)

    def get(self, output: str) -> Array:
        """See `WholeLoop.get`."""
        buffer = self._results.get(output)
        if buffer is None and output in self._carried and self._results:
            buffer = self._buffers[output]
        if buffer is None:
            raise EngineError(f"'{output}' is no output of a call that was made")
        return buffer.read()

    def _require(self, calls: Sequence[str], schedule: Collection[str]) -> None:
        missing = lacking(self._names, self._carries, calls, (*self._known, *schedule))
        if missing:
            raise EngineError(f"a loop of program '{self._program.name}' lacks {sorted(missing)}")

    def _call(self, program: str) -> None:
        try:
            with self._turns.get(program, nullcontext()):
                self._sessions[program].run_with_iobinding(self._bindings[program], self._options)
        except Exception as error:  # ONNX Runtime's classes share no public base
            raise EngineError(f"program '{program}' failed: {error}") from error
        self._results |= {name: self._buffers[name] for name in self._names[program][1]}
        for chain in self._carries.get(program, ()):
            ring = [self._buffers[name] for name in chain]
            for name, buffer in zip(chain, (ring[-1], *ring[:-1]), strict=True):
                self._buffers[name] = buffer
                self._bind(name)

    def _bind(self, name: str) -> None:
        value = self._buffers[name].value
        for program, (inputs, outputs) in self._names.items():
            if name in inputs:
                self._bindings[program].bind_ortvalue_input(name, value)
            if name in outputs:
                self._bindings[program].bind_ortvalue_output(name, value)


class BoundWholeLoop(BoundLoop):
    """A `BoundLoop` whose calls are handed over at once; ONNX Runtime waits for each of them."""

    def run(self, schedule: Mapping[str, Scheduled], calls: Sequence[str]) -> None:
        """See `WholeLoop.run`."""
        self._require(calls, schedule)
        before: dict[str, int] = {}
        for index, program in enumerate(calls):
            inputs = self._names[program][0]
            for name, scheduled in schedule.items():
                position = scheduled.order[index]
                if name in inputs and before.get(name) != position:
                    self.put(**{name: scheduled.values[position]})
                    before[name] = position
            self._call(program)
        self._known -= self._carried

    def close(self) -> None:
        """See `WholeLoop.close`; memory goes with the object."""


def _bindable_names(session: Any, program: ProgramSpec) -> tuple[set[str], set[str]]:
    """Names of a session's inputs and outputs, all of the dtypes that the program declares."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    types = {"float32": "tensor(float)", "int64": "tensor(int64)"}
    declared = {t.name: t for t in (*program.inputs, *program.outputs)}
    odd = [x.name for x in (*inputs, *outputs) if x.type != types[declared[x.name].dtype]]
    if odd:
        raise EngineError(f"program '{program.name}' cannot be bound: odd dtype of {odd}")
    return {x.name for x in inputs}, {x.name for x in outputs}


def shape_of(tensor: TensorSpec, dimensions: Dimensions, rows: int) -> tuple[int, ...]:
    """A tensor's shape in calls of that many rows."""
    return tuple(rows if isinstance(n, str) else n for n in tensor.shape(dimensions))
