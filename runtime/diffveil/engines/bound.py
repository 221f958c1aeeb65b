"""A loop in ONNX Runtime on buffers of its own: allocated once, rotated between calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffveil.engines._base import Array
from diffveil.engines._loop import Carry
from diffveil.errors import EngineError
from diffveil.programs import Dimensions, ProgramSpec, TensorSpec

__all__ = ["BoundLoop"]


class _Buffer:
    """An array and ONNX Runtime's view of the same memory."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        from onnxruntime import OrtValue

        self.array: Array = np.zeros(shape, dtype=dtype)
        # On the CPU this shares the array's memory, so writing to the array is all of the copying.
        self.value: Any = OrtValue.ortvalue_from_numpy(self.array)


class BoundLoop:
    """Owns one buffer a tensor of a program, and the binding of a session to them.

    A chain of `carry` is a ring: after a call the output's buffer becomes the first input's, that
    one the next input's, and the last one takes the next output. So nothing moves but names.

    Args:
        session: ONNX Runtime session of the program, on the CPU.
        program: Its declaration.
        dimensions: Sizes of the bundle's fixed axes.
        rows: Size of the dynamic axis.
        carry: How outputs become inputs.

    Raises:
        EngineError: A graph's tensor is not of the dtype that the program declares.
    """

    def __init__(
        self, session: Any, program: ProgramSpec, dimensions: Dimensions, rows: int, carry: Carry
    ) -> None:
        self._session, self._program, self._carry = session, program, carry
        inputs, outputs = session.get_inputs(), session.get_outputs()
        types = {"float32": "tensor(float)", "int64": "tensor(int64)"}
        declared = {t.name: t for t in (*program.inputs, *program.outputs)}
        odd = [x.name for x in (*inputs, *outputs) if x.type != types[declared[x.name].dtype]]
        if odd:
            raise EngineError(f"program '{program.name}' cannot be bound: odd dtype of {odd}")
        self._inputs = {i.name for i in inputs}
        self._buffers = {
            name: _Buffer(_shape(tensor, dimensions, rows), tensor.dtype)
            for name, tensor in declared.items()
        }
        self._results: dict[str, Array] = {}
        self._missing = set(self._inputs)
        self._binding = session.io_binding()
        for name in declared:
            self._bind(name)

    def put(self, **inputs: Array) -> None:
        """See `Loop.put`."""
        wanted = {t.name for t in self._program.inputs}
        problems = []
        for name, array in inputs.items():
            if name not in wanted:
                problems.append(f"{name}: not an input")
                continue
            buffer = self._buffers[name].array
            if array.shape != buffer.shape or array.dtype != buffer.dtype:
                problems.append(
                    f"{name}: received {array.dtype} {list(array.shape)}, "
                    f"expected {buffer.dtype} {list(buffer.shape)}"
                )
        if problems:
            raise EngineError(
                f"a loop of program '{self._program.name}' was fed wrongly: " + "; ".join(problems)
            )
        for name, array in inputs.items():
            np.copyto(self._buffers[name].array, array)
        self._missing -= inputs.keys()

    def step(self) -> None:
        """See `Loop.step`."""
        if self._missing:
            raise EngineError(
                f"a loop of program '{self._program.name}' lacks {sorted(self._missing)}"
            )
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's classes share no public base
            raise EngineError(f"program '{self._program.name}' failed: {error}") from error
        self._results = {t.name: self._buffers[t.name].array for t in self._program.outputs}
        for chain in self._carry:
            ring = [self._buffers[name] for name in chain]
            for name, buffer in zip(chain, (ring[-1], *ring[:-1]), strict=True):
                self._buffers[name] = buffer
                self._bind(name)

    def get(self, output: str) -> Array:
        """See `Loop.get`."""
        if output not in self._results:
            raise EngineError(f"'{output}' is no output of a call that was made")
        return np.array(self._results[output])

    def _bind(self, name: str) -> None:
        value = self._buffers[name].value
        if name in self._inputs:
            self._binding.bind_ortvalue_input(name, value)
        elif any(t.name == name for t in self._program.outputs):
            self._binding.bind_ortvalue_output(name, value)


def _shape(tensor: TensorSpec, dimensions: Dimensions, rows: int) -> tuple[int, ...]:
    return tuple(rows if isinstance(n, str) else n for n in tensor.shape(dimensions))
