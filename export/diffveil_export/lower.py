"""Lowers a module to ONNX through `torch.export`, with a dynamic batch."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from onnxscript.rewriter import onnx_fusions
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffveil.programs import DYNAMIC_AXES, ProgramSpec
from diffveil_export.models.low_rank import FACTORS

__all__ = ["BFLOAT16_OPSET", "INT4_OPSET", "OPSET", "lower"]

OPSET = 20
"""ONNX operator set of programs: the newest that ONNX Runtime 1.20 and TensorRT 10.3 read."""

INT4_OPSET = 21
"""Operator set of programs with weights in four bits: the first that has them, and blocks. ONNX
Runtime 1.20 reads it; TensorRT needs a version after 10.3."""

BFLOAT16_OPSET = 22
"""Operator set of programs in bfloat16: the first in which convolutions may be of this type."""


def lower(
    module: nn.Module,
    spec: ProgramSpec,
    inputs: tuple[torch.Tensor, ...],
    *,
    opset: int = OPSET,
) -> ir.Model:
    """Export `module` as the program `spec`.

    Args:
        module: Takes and returns what `spec` declares, in order; evaluation mode, frozen weights.
        spec: Names inputs and outputs, and which axes are dynamic.
        inputs: Example inputs with a batch of at least two.
        opset: ONNX operator set.

    Returns:
        A model whose graph inputs and outputs are named as in `spec`; weights in memory.
    """
    dynamic = tuple(
        {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(tensor.axes) if axis in DYNAMIC_AXES}
        for tensor in spec.inputs
    )
    # `*inputs` is one argument, a tuple.
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        shapes: Any = (dynamic,)
    else:
        shapes = dynamic
    # The fused attention operator has no gradient that could be lowered and no advantage here:
    # engines recognise the plain formula.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _quiet():
        exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=opset,
            input_names=[t.name for t in spec.inputs],
            output_names=[t.name for t in spec.outputs],
            optimize=False,
            verbose=False,
        )
        assert program is not None
        model = program.model
        # What `optimize=True` does, but for low-rank factors: folded, they would be full weights.
        optimizer.optimize_ir(model, should_fold=_may_fold)
        onnx_fusions.fuse(model)
    _name_axes(model, spec)
    _strip(model)
    return model


def _may_fold(node: ir.Node) -> bool | None:
    """False for nodes that multiply low-rank factors; None leaves the choice to size limits."""
    names = [value.name or "" for value in node.inputs if value is not None]
    return False if any(name.endswith(FACTORS) for name in names) else None


def _name_axes(model: ir.Model, spec: ProgramSpec) -> None:
    """Name dynamic axes as the declaration does, whatever symbols tracing invented."""
    tensors = zip(
        (*model.graph.inputs, *model.graph.outputs), (*spec.inputs, *spec.outputs), strict=True
    )
    for value, tensor in tensors:
        assert value.name == tensor.name, f"{value.name} is not {tensor.name}"
        if value.shape is not None:
            sizes = zip(tensor.axes, value.shape, strict=True)
            value.shape = ir.Shape([a if a in DYNAMIC_AXES else d for a, d in sizes])


def _strip(model: ir.Model) -> None:
    """Drop what tracing noted about itself: source lines, paths and module names.

    They make files larger and name folders of the machine that exported.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what PyTorch's exporter says about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\..*")
            warnings.filterwarnings("ignore", module=r"(onnxscript|onnx_ir|copyreg)\b.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
