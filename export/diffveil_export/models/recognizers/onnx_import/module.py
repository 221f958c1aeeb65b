"""An ONNX graph as a PyTorch module: differentiable, traceable, for any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.models.recognizers.onnx_import.layout import MAX_ELEMENTS
from diffveil_export.models.recognizers.onnx_import.operators import OPERATORS
from diffveil_export.models.recognizers.onnx_import.parse import Graph, Node, read_graph
from diffveil_export.models.recognizers.onnx_import.values import (
    HostArray,
    Operation,
    Trace,
    Value,
    View,
)

__all__ = ["OnnxModule", "load_onnx"]

_BATCHES = (2, 3)
_DEFAULT_SIDE = 112
_MIXING = 1e-3


@dataclass(frozen=True)
class _Step:
    """A node that runs with every image."""

    label: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class OnnxModule(nn.Module):
    """Runs a graph's nodes in order; its floating-point constants are frozen parameters.

    Building walks the graph twice, for two sizes of the batch and without numbers. What is the same
    for both is computed once and for all, so that axes, shapes and indices are constants wherever
    they can be; an axis that differs is the batch. A reshape to [1, …] of a tensor whose first axis
    is the batch is taken for one to [batch, …]: that is how exporters for a batch of one write it.

    Args:
        graph: As `read_graph` returns it.
        side: Height and width of images in pixels where the graph leaves them open.

    Raises:
        OptionError: Operators are unsupported, all of which are named; or a node cannot be run
            with a batch; or the output is not one vector an image.
    """

    def __init__(self, graph: Graph, side: int = _DEFAULT_SIDE) -> None:
        super().__init__()
        self.image_shape, self.channels_last = _image_shape(graph, side)
        unsupported: dict[str, list[str]] = {}
        for node in graph.nodes:
            if node.op not in OPERATORS:
                unsupported.setdefault(node.op, []).append(f"'{node.name}'")
        if unsupported:
            listed = "; ".join(f"{op} in {', '.join(names)}" for op, names in unsupported.items())
            raise OptionError(f"unsupported ONNX operators: {listed}")

        self._input, self._output = graph.input, graph.output
        constants: dict[str, Value] = {
            name: torch.from_numpy(array) if array.dtype == np.float32 else array
            for name, array in graph.constants.items()
        }
        images = [torch.empty(n, *self.image_shape, device="meta") for n in _BATCHES]
        traces: dict[str, Trace] = {graph.input: (images[0], images[1])}
        steps = []
        for node in graph.nodes:
            step = _build(node, graph.opset, constants, traces)
            if step is not None:
                steps.append(step)
        self.embedding_width = _check_output(graph.output, traces)

        used = {name for step in steps for name in step.inputs}
        self._host: dict[str, HostArray] = {}
        self._indices: dict[str, int] = {}
        self.weights = nn.ParameterList()
        for name, value in constants.items():
            if name in used and isinstance(value, torch.Tensor):
                self._indices[name] = len(self.weights)
                self.weights.append(nn.Parameter(value.contiguous(), requires_grad=False))
            elif name in used and not isinstance(value, torch.Tensor):
                self._host[name] = value
        self._steps = steps
        last: dict[str, int] = {n: i for i, step in enumerate(steps) for n in step.inputs}
        self._drop = [
            [n for n in dict.fromkeys(step.inputs) if last[n] == i and n != graph.output]
            for i, step in enumerate(steps)
        ]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, E], as the graph returns them, of images as the graph expects them."""
        values: dict[str, Any] = {self._input: image, **self._host}
        values |= {name: self.weights[i] for name, i in self._indices.items()}
        for step, drop in zip(self._steps, self._drop, strict=True):
            result = step.function(*(values[name] for name in step.inputs))
            results = result if isinstance(result, list) else [result]
            values.update(zip(step.outputs, results, strict=False))
            for name in drop:
                values.pop(name, None)
        embedding: torch.Tensor = values[self._output]
        return embedding.flatten(1)


def load_onnx(file: Path, side: int = _DEFAULT_SIDE) -> tuple[OnnxModule, Graph]:
    """Read `file` as a module, and make sure that it treats the images of a batch separately.

    Args:
        file: An ONNX model with one input, an image batch [B, 3, H, W] or [B, H, W, 3].
        side: Height and width of images in pixels where the file leaves them open.

    Raises:
        OptionError: As `read_graph` and `OnnxModule`; or the images of a batch are mixed.
    """
    graph = read_graph(file)
    module = OnnxModule(graph, side).eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, *module.image_shape, generator=generator) * 2 - 1
    with torch.no_grad():
        together = module(images)
        alone = torch.cat([module(image[None]) for image in images])
    scale = alone.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if not bool(((together - alone).norm(dim=1, keepdim=True) <= _MIXING * scale).all()):
        raise OptionError(
            f"'{file}' mixes the images of a batch, or its output is not finite: export it again "
            "with a dynamic batch axis"
        )
    return module, graph


def _build(
    node: Node, opset: int, constants: dict[str, Value], traces: dict[str, Trace]
) -> _Step | None:
    """Run a node that is constant, adding to `constants`; else note its step and its traces."""
    outputs = [name for name in node.outputs if name]
    try:
        operation = OPERATORS[node.op](View(node, opset, constants, traces))
        names = tuple(node.inputs[i] for i in operation.operands)
        if all(name in constants for name in names):
            operands = [constants[name] for name in names]
            results = _run_constant(operation, operands)
            constants.update(zip(outputs, results, strict=False))
            return None
        pair = [
            _listed(operation.function(*(_trace(name, i, constants, traces) for name in names)))
            for i in range(2)
        ]
    except OptionError:
        raise
    except Exception as error:  # whatever PyTorch or NumPy say about shapes that do not fit
        raise OptionError(f"{node.label} cannot be run with a batch of images: {error}") from error
    fixed = True
    for name, first, second in zip(outputs, *pair, strict=False):
        _check_elements(node, first)
        same = not isinstance(first, torch.Tensor) and np.array_equal(first, second)
        if same:
            constants[name] = first
        else:
            traces[name] = (first, second)
        fixed = fixed and same
    return None if fixed else _Step(node.label, operation.function, names, tuple(node.outputs))


def _run_constant(operation: Operation, operands: Sequence[Value]) -> list[Value]:
    tensors = [o for o in operands if isinstance(o, torch.Tensor)]
    if tensors and sum(o.numel() for o in tensors) > 1 << 16:
        # Without numbers first: a product of two vectors may be larger than memory.
        shadows = [o.to("meta") if isinstance(o, torch.Tensor) else o for o in operands]
        for result in _listed(operation.function(*shadows)):
            if isinstance(result, torch.Tensor) and result.numel() > MAX_ELEMENTS:
                raise ValueError(f"{result.numel()} numbers, at most {MAX_ELEMENTS} are allowed")
    with torch.no_grad():
        return _listed(operation.function(*operands))


def _listed(result: Any) -> list[Value]:
    return result if isinstance(result, list) else [result]


def _trace(name: str, which: int, constants: dict[str, Value], traces: dict[str, Trace]) -> Value:
    value = traces[name][which] if name in traces else constants[name]
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _check_elements(node: Node, value: Value) -> None:
    count = value.numel() if isinstance(value, torch.Tensor) else value.size
    if count > MAX_ELEMENTS:
        raise OptionError(
            f"{node.label}: {count} numbers for {_BATCHES[0]} images, at most {MAX_ELEMENTS} are "
            "allowed"
        )


def _image_shape(graph: Graph, side: int) -> tuple[tuple[int, int, int], bool]:
    """Sizes of one image, and whether channels are its last axis."""
    shape = graph.input_shape
    if len(shape) == 4 and shape[1] in (3, None):
        size = (3, shape[2] or side, shape[3] or side)
        last = False
    elif len(shape) == 4 and shape[3] == 3:
        size, last = (shape[1] or side, shape[2] or side, 3), True
    else:
        size, last = (0, 0, 0), False
    if 0 in size or size[0 if last else 1] != size[1 if last else 2] or max(size) > 1024:
        raise OptionError(
            f"input '{graph.input}': received {['?' if n is None else n for n in shape]}, expected "
            "square colour images [batch, 3, side, side] or [batch, side, side, 3], of at most "
            "1024 pixels a side"
        )
    return size, last


def _check_output(name: str, traces: dict[str, Trace]) -> int:
    """Width of the output: one vector an image."""
    trace = traces.get(name)
    if trace is None or not isinstance(trace[0], torch.Tensor):
        raise OptionError(f"output '{name}' does not depend on the image")
    shapes = [tuple(int(n) for n in t.shape) for t in trace]
    ranks = [s[0] == n and s[1:] == shapes[0][1:] for s, n in zip(shapes, _BATCHES, strict=True)]
    width = int(np.prod(shapes[0][1:]))
    if not all(ranks) or width < 2 or max(shapes[0][1:]) != width:
        raise OptionError(
            f"output '{name}': for {_BATCHES[0]} and {_BATCHES[1]} images received "
            f"{list(shapes[0])} and {list(shapes[1])}, expected one vector an image"
        )
    return width
