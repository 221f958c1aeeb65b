"""ONNX operators that treat every number alike: arithmetic and activations."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from diffveil_export.models.recognizers.onnx_import.values import (
    HostArray,
    Operation,
    Value,
    View,
    number,
    objects,
    tensor,
)

__all__ = ["ELEMENTWISE"]

_REAL_TYPES = (1, 10, 11, 16)  # TensorProto: float, float16, double, bfloat16


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[View], Operation]:
    return lambda view: Operation(lambda x: function(tensor(x)), (0,))


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[View], Operation]:
    """Arithmetic of tensors, of shapes, or of a tensor and one number of a shape."""

    def apply(a: Value, b: Value) -> Value:
        if isinstance(a, torch.Tensor):
            result: Value = function(a, b if isinstance(b, torch.Tensor) else number(b))
        elif isinstance(b, torch.Tensor):
            result = function(number(a), b)
        else:
            result = np.asarray(function(a, b))
        return result

    return lambda view: Operation(apply, (0, 1))


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a / b
    # Shapes are never negative, so rounding down is ONNX's rounding towards zero.
    return a // b


def _power(view: View) -> Operation:
    if view.is_constant(1) and view.constant(1).size == 1:
        exponent = float(view.constant(1).reshape(-1)[0])
        return Operation(lambda x: tensor(x).pow(exponent), (0,))
    return Operation(lambda x, y: torch.pow(tensor(x), y), (0, 1))


def _variadic(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[View], Operation]:
    def build(view: View) -> Operation:
        return Operation(lambda *xs: reduce(function, map(tensor, xs)), view.present())

    return build


def _clip(view: View) -> Operation:
    low, high = view.real(1, "min"), view.real(2, "max")
    if low is None and high is None:
        return Operation(tensor, (0,))
    return Operation(lambda x: tensor(x).clamp(low, high), (0,))


def _prelu(view: View) -> Operation:
    def apply(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        # Slopes are broadcast from the right, as [C, 1, 1]; PyTorch's operator wants [C].
        channels = slope.ndim > 0 and x.ndim >= 2 and slope.ndim >= x.ndim - 1
        shape = slope.shape[-(x.ndim - 1) :]
        if slope.numel() == 1 or (
            channels and slope.numel() == shape[0] and shape[0] == x.shape[1]
        ):
            return functional.prelu(x, slope.reshape(-1))
        return torch.where(x < 0, slope * x, x)

    return Operation(apply, (0, 1))


def _leaky_relu(view: View) -> Operation:
    slope = float(view.attribute("alpha", 0.01))
    return Operation(lambda x: functional.leaky_relu(tensor(x), slope), (0,))


def _elu(view: View) -> Operation:
    alpha = float(view.attribute("alpha", 1.0))
    return Operation(lambda x: functional.elu(tensor(x), alpha), (0,))


def _hard_sigmoid(view: View) -> Operation:
    alpha, beta = float(view.attribute("alpha", 0.2)), float(view.attribute("beta", 0.5))
    return Operation(lambda x: (tensor(x) * alpha + beta).clamp(0.0, 1.0), (0,))


def _hard_swish(x: torch.Tensor) -> torch.Tensor:
    return x * (x / 6 + 0.5).clamp(0.0, 1.0)


def _gelu(view: View) -> Operation:
    form = str(view.attribute("approximate", "none"))
    return Operation(lambda x: functional.gelu(tensor(x), approximate=form), (0,))


def _softmax(view: View) -> Operation:
    axis = int(view.attribute("axis", -1 if view.opset >= 13 else 1))

    def apply(x: torch.Tensor) -> torch.Tensor:
        if view.opset >= 13:
            return x.softmax(axis)
        start = axis % x.ndim  # older sets normalise all axes from this one on together
        return x.flatten(start).softmax(-1).reshape(x.shape)

    return Operation(apply, (0,))


def _cast(view: View) -> Operation:
    real = int(view.attribute("to", 1)) in _REAL_TYPES

    def whole(value: Value) -> HostArray:
        if isinstance(value, torch.Tensor):
            return value.numpy().astype(np.int64)
        return objects([int(v) for v in value.reshape(-1)]).reshape(value.shape)

    def to_real(value: Value) -> Value:
        # The module's own type decides how exact tensors are, not the file's.
        if isinstance(value, torch.Tensor):
            return value
        flat = [torch.sym_float(v) for v in value.reshape(-1).tolist()]  # type: ignore[no-untyped-call]
        array = np.empty(len(flat), object)
        array[:] = flat
        return array.reshape(value.shape)

    if not real and view.traced(0):
        raise view.error("rounds what depends on the image: that has no gradient")
    return Operation(to_real if real else whole, (0,))


def _identity(view: View) -> Operation:
    if len(view.node.outputs) > 1 and view.node.outputs[1]:
        raise view.error("its second output, the mask, is not supported")
    return Operation(lambda x: x, (0,))


ELEMENTWISE: dict[str, Callable[[View], Operation]] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(operator.add),
    "Cast": _cast,
    "Clip": _clip,
    "Div": _binary(_divide),
    "Dropout": _identity,
    "Elu": _elu,
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(_hard_swish),
    "Identity": _identity,
    "LeakyRelu": _leaky_relu,
    "Log": _unary(torch.log),
    "Max": _variadic(torch.maximum),
    "Min": _variadic(torch.minimum),
    "Mul": _binary(operator.mul),
    "Neg": _unary(torch.neg),
    "PRelu": _prelu,
    "Pow": _power,
    "Reciprocal": _unary(torch.reciprocal),
    "Relu": _unary(torch.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Softmax": _softmax,
    "Softplus": _unary(functional.softplus),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(operator.sub),
    "Sum": _variadic(torch.add),
    "Tanh": _unary(torch.tanh),
}
"""Builders by type of operator."""
