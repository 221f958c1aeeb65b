"""Values of an imported graph, and what an operator's builder may ask about its node.

A value is a tensor, or an array on the host: shapes, axes and indices. Arithmetic on shapes stays
in Python, where PyTorch's tracing follows it: a batch of unknown size stays unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from diffveil.errors import OptionError
from diffveil_export.models.recognizers.onnx_import.parse import Node

__all__ = [
    "HostArray",
    "Operation",
    "Trace",
    "Value",
    "View",
    "host",
    "number",
    "objects",
    "tensor",
]

HostArray: TypeAlias = NDArray[Any]
"""Integers, or Python objects where symbolic sizes are among them."""

Value: TypeAlias = "torch.Tensor | HostArray"

Trace: TypeAlias = "tuple[Value, Value]"
"""A value as it is for two different batches, without its content if it is a tensor."""


@dataclass(frozen=True)
class Operation:
    """What a node does.

    Attributes:
        function: Takes the operands; returns one value or a list of them.
        operands: Numbers of the node's inputs that `function` takes.
    """

    function: Callable[..., Any]
    operands: tuple[int, ...]


class View:
    """A node, with the constants and traces among its inputs.

    Args:
        node: The node.
        opset: Version of ONNX's operators.
        constants: Values that do not depend on the graph's input, by name.
        traces: The others, by name.
    """

    def __init__(
        self, node: Node, opset: int, constants: Mapping[str, Value], traces: Mapping[str, Trace]
    ) -> None:
        self.node, self.opset = node, opset
        self._constants, self._traces = constants, traces

    def has(self, index: int) -> bool:
        """Whether input `index` is there."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index])

    def present(self) -> tuple[int, ...]:
        """Numbers of all inputs that are there."""
        return tuple(i for i in range(len(self.node.inputs)) if self.has(i))

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute; None or the default where it is left out."""
        return self.node.attributes.get(name, default)

    def constant(self, index: int) -> NDArray[Any]:
        """The content of input `index`, which must not depend on the graph's input.

        Raises:
            OptionError: It does.
        """
        value = self._constants.get(self.node.inputs[index])
        if value is None:
            raise self.error(f"input {index} ('{self.node.inputs[index]}') must be constant")
        return value.numpy() if isinstance(value, torch.Tensor) else value

    def is_constant(self, index: int) -> bool:
        """Whether `constant` can be asked."""
        return self.node.inputs[index] in self._constants

    def traced(self, index: int) -> bool:
        """Whether input `index` is a tensor that depends on the image."""
        trace = self._traces.get(self.node.inputs[index])
        return trace is not None and isinstance(trace[0], torch.Tensor)

    def whole(self, index: int, name: str) -> list[int] | None:
        """Integers from constant input `index` or, in older operator sets, attribute `name`."""
        if self.has(index):
            return [int(v) for v in self.constant(index).reshape(-1)]
        value = self.attribute(name)
        if value is None:
            return None
        return [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]

    def real(self, index: int, name: str, default: float | None = None) -> float | None:
        """A number from constant input `index` or, in older operator sets, attribute `name`."""
        if self.has(index):
            value = self.constant(index)
            if value.size != 1:
                raise self.error(f"input {index}: received {value.shape}, expected one number")
            return float(value.reshape(-1)[0])
        found = self.attribute(name, default)
        return None if found is None else float(found)

    def batch_first(self, index: int) -> bool:
        """Whether the first axis of input `index` is the batch."""
        trace = self._traces.get(self.node.inputs[index])
        if trace is None or not isinstance(trace[0], torch.Tensor) or trace[0].ndim == 0:
            return False
        return bool(trace[0].shape[0] != trace[1].shape[0])

    def shape(self, index: int) -> tuple[int, ...]:
        """Sizes of input `index`, for the first of the two batches traced."""
        name = self.node.inputs[index]
        value = self._traces[name][0] if name in self._traces else self._constants[name]
        return tuple(int(n) for n in value.shape)

    def error(self, problem: str) -> OptionError:
        """An error that names the node."""
        return OptionError(f"{self.node.label}: {problem}")

    def require(self, **expected: Any) -> None:
        """Raise unless attributes, where given, have these values."""
        wrong = [
            f"{name}: received {self.node.attributes[name]!r}, supported is {value!r}"
            for name, value in expected.items()
            if self.node.attributes.get(name, value) != value
        ]
        if wrong:
            raise self.error("; ".join(wrong))


def host(value: Value) -> HostArray:
    """A value that must be on the host."""
    if isinstance(value, torch.Tensor):
        raise TypeError("depends on what is in the image: only shapes may decide about shapes")
    return value


def number(value: HostArray) -> Any:
    """A single number, which may be symbolic."""
    if value.size != 1:
        raise TypeError(f"several integers {value.tolist()} where an image's numbers are computed")
    return value.reshape(-1)[0].item() if value.dtype != object else value.reshape(-1)[0]


def tensor(value: Value) -> torch.Tensor:
    """A value that must be a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError("integers where a tensor of floating-point numbers is expected")
    return value


def objects(values: list[Any]) -> HostArray:
    """A host array [n] of integers, symbolic or not."""
    if all(isinstance(v, int) for v in values):
        return np.array(values, np.int64)
    array = np.empty(len(values), object)
    array[:] = values
    return array
