"""A loop in ONNX Runtime on buffers of its own: allocated once, rotated between calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffveil.engines._base import Array
from diffveil.engines._loop import Carry, check_put
from diffveil.errors import EngineError
from diffveil.programs import Dimensions, ProgramSpec, TensorSpec

__all__ = ["CPU", "BoundLoop", "DeviceBuffer", "shape_of"]


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
    """Owns one buffer a tensor of a program, and the binding of a session to them.

    A chain of `carry` is a ring: after a call the output's buffer becomes the first input's, that
    one the next input's, and the last one takes the next output. So nothing moves but names.

    Args:
        session: ONNX Runtime session of the program.
        program: Its declaration.
        dimensions: Sizes of the bundle's fixed axes.
        rows: Size of the dynamic axis.
        carry: How outputs become inputs.
        device: Where the buffers lie, as ONNX Runtime names it.
        options: ONNX Runtime's `RunOptions` of every call.

    Raises:
        EngineError: A graph's tensor is not of the dtype that the program declares.
    """

    def __init__(
        self,
        session: Any,
        program: ProgramSpec,
        dimensions: Dimensions,
        rows: int,
        carry: Carry,
        device: tuple[str, int] = CPU,
        options: Any = None,
    ) -> None:
        self._options = options
        self._session, self._program, self._carry = session, program, carry
        inputs, outputs = session.get_inputs(), session.get_outputs()
        types = {"float32": "tensor(float)", "int64": "tensor(int64)"}
        declared = {t.name: t for t in (*program.inputs, *program.outputs)}
        odd = [x.name for x in (*inputs, *outputs) if x.type != types[declared[x.name].dtype]]
        if odd:
            raise EngineError(f"program '{program.name}' cannot be bound: odd dtype of {odd}")
        self._inputs = {i.name for i in inputs}
        self._buffers = {
            name: DeviceBuffer(shape_of(tensor, dimensions, rows), tensor.dtype, device)
            for name, tensor in declared.items()
        }
        self._results: dict[str, DeviceBuffer] = {}
        self._missing = set(self._inputs)
        self._binding = session.io_binding()
        for name in declared:
            self._bind(name)

    def put(self, **inputs: Array) -> None:
        """See `Loop.put`."""
        shapes = {name: buffer.shape for name, buffer in self._buffers.items()}
        check_put(self._program, inputs, shapes)
        for name, array in inputs.items():
            self._buffers[name].write(array)
        self._missing -= inputs.keys()

    def step(self) -> None:
        """See `Loop.step`."""
        if self._missing:
            raise EngineError(
                f"a loop of program '{self._program.name}' lacks {sorted(self._missing)}"
            )
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # ONNX Runtime's classes share no public base
            raise EngineError(f"program '{self._program.name}' failed: {error}") from error
        self._results = {t.name: self._buffers[t.name] for t in self._program.outputs}
        for chain in self._carry:
            ring = [self._buffers[name] for name in chain]
            for name, buffer in zip(chain, (ring[-1], *ring[:-1]), strict=True):
                self._buffers[name] = buffer
                self._bind(name)

    def get(self, output: str) -> Array:
        """See `Loop.get`."""
        if output not in self._results:
            raise EngineError(f"'{output}' is no output of a call that was made")
        return self._results[output].read()

    def _bind(self, name: str) -> None:
        value = self._buffers[name].value
        if name in self._inputs:
            self._binding.bind_ortvalue_input(name, value)
        elif any(t.name == name for t in self._program.outputs):
            self._binding.bind_ortvalue_output(name, value)


def shape_of(tensor: TensorSpec, dimensions: Dimensions, rows: int) -> tuple[int, ...]:
    """A tensor's shape in calls of that many rows."""
    return tuple(rows if isinstance(n, str) else n for n in tensor.shape(dimensions))
