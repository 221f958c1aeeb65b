"""ONNX operators with weights, windows or statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from diffveil_export.models.recognizers.onnx_import.values import Operation, View, tensor

__all__ = ["NEURAL"]

Pads = tuple[int, int, int, int]
"""Left, right, top, bottom, in PyTorch's order."""


class _Windows:
    """Stride, dilation and padding of a 2-D convolution or pooling."""

    def __init__(self, view: View, kernel: Sequence[int]) -> None:
        if len(kernel) != 2:
            raise view.error(f"a window of {len(kernel)} dimensions; only 2 are supported")
        self.kernel = (int(kernel[0]), int(kernel[1]))
        self.stride = tuple(int(n) for n in view.attribute("strides", (1, 1)))
        self.dilation = tuple(int(n) for n in view.attribute("dilations", (1, 1)))
        self.auto = str(view.attribute("auto_pad", "NOTSET") or "NOTSET")
        top, left, bottom, right = view.attribute("pads", (0, 0, 0, 0))
        self._pads: Pads = (int(left), int(right), int(top), int(bottom))

    def pads(self, x: torch.Tensor) -> Pads:
        """Padding of `x`."""
        if self.auto == "VALID":
            return (0, 0, 0, 0)
        if self.auto == "NOTSET":
            return self._pads
        amounts = []
        for axis in (1, 0):
            length, step = int(x.shape[2 + axis]), self.stride[axis]
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            total = max((-(-length // step) - 1) * step + reach - length, 0)
            less, more = total // 2, total - total // 2
            amounts += [less, more] if self.auto == "SAME_UPPER" else [more, less]
        return (amounts[0], amounts[1], amounts[2], amounts[3])

    def symmetric(self, x: torch.Tensor) -> tuple[Pads, tuple[int, int]]:
        """What must be padded beforehand, and what an operator can pad by itself."""
        left, right, top, bottom = pads = self.pads(x)
        if left == right and top == bottom:
            return (0, 0, 0, 0), (top, left)
        return pads, (0, 0)


def _conv(view: View) -> Operation:
    groups = int(view.attribute("group", 1))
    windows = _Windows(view, view.attribute("kernel_shape") or view.shape(1)[2:])

    def apply(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        before, padding = windows.symmetric(x)
        if any(before):
            x = functional.pad(x, before)
        return functional.conv2d(x, weight, bias, windows.stride, padding, windows.dilation, groups)

    return Operation(apply, view.present())


def _max_pool(view: View) -> Operation:
    view.require(storage_order=0)
    if len(view.node.outputs) > 1 and view.node.outputs[1]:
        raise view.error("its second output, the indices, is not supported")
    windows = _Windows(view, view.attribute("kernel_shape"))
    ceil = bool(view.attribute("ceil_mode", 0))

    def apply(x: torch.Tensor) -> torch.Tensor:
        before, padding = windows.symmetric(x)
        if 2 * padding[0] > windows.kernel[0] or 2 * padding[1] > windows.kernel[1]:
            before, padding = windows.pads(x), (0, 0)
        if any(before):
            x = functional.pad(x, before, value=float("-inf"))
        return functional.max_pool2d(
            x, windows.kernel, windows.stride, padding, windows.dilation, ceil
        )

    return Operation(apply, (0,))


def _average_pool(view: View) -> Operation:
    view.require(dilations=[1, 1])
    windows = _Windows(view, view.attribute("kernel_shape"))
    ceil = bool(view.attribute("ceil_mode", 0))
    count_pads = bool(view.attribute("count_include_pad", 0))

    def apply(x: torch.Tensor) -> torch.Tensor:
        before, padding = windows.symmetric(x)

        def pool(values: torch.Tensor) -> torch.Tensor:
            return functional.avg_pool2d(
                values, windows.kernel, windows.stride, padding, ceil, count_pads
            )

        if not any(before):
            return pool(x)
        padded = pool(functional.pad(x, before))
        if count_pads:
            return padded
        inside = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
        return padded / pool(functional.pad(inside, before))

    return Operation(apply, (0,))


def _global_average_pool(view: View) -> Operation:
    return Operation(lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True), (0,))


def _global_max_pool(view: View) -> Operation:
    return Operation(lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True), (0,))


def _reduction(
    function: Callable[[torch.Tensor, tuple[int, ...], bool], torch.Tensor],
) -> Callable[[View], Operation]:
    def build(view: View) -> Operation:
        axes, keep = view.whole(1, "axes"), bool(view.attribute("keepdims", 1))
        nothing = not axes and bool(view.attribute("noop_with_empty_axes", 0))

        def apply(x: torch.Tensor) -> torch.Tensor:
            if nothing:
                return x
            return function(tensor(x), tuple(axes or range(x.ndim)), keep)

        return Operation(apply, (0,))

    return build


def _norm(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    result: torch.Tensor = torch.linalg.vector_norm(x, 2, axes, keep)
    return result


def _lp_normalization(view: View) -> Operation:
    axis, p = int(view.attribute("axis", -1)), int(view.attribute("p", 2))

    def apply(x: torch.Tensor) -> torch.Tensor:
        return functional.normalize(x, p, axis, eps=1e-30)

    return Operation(apply, (0,))


def _batch_normalization(view: View) -> Operation:
    view.require(training_mode=0, spatial=1)
    eps = float(view.attribute("epsilon", 1e-5))

    def apply(x: torch.Tensor, *statistics: torch.Tensor) -> torch.Tensor:
        scale, bias, mean, variance = statistics
        return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, eps)

    return Operation(apply, (0, 1, 2, 3, 4))


def _instance_normalization(view: View) -> Operation:
    eps = float(view.attribute("epsilon", 1e-5))

    def apply(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        # Spelled out: PyTorch's own joins batch and channels, and so fixes the batch.
        axes, shape = tuple(range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
        centred = x - x.mean(axes, keepdim=True)
        spread = (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
        return centred * spread * scale.reshape(shape) + bias.reshape(shape)

    return Operation(apply, (0, 1, 2))


def _layer_normalization(view: View) -> Operation:
    axis, eps = int(view.attribute("axis", -1)), float(view.attribute("epsilon", 1e-5))

    def apply(x: torch.Tensor, scale: torch.Tensor, bias: Any = None) -> torch.Tensor:
        shape = [int(n) for n in x.shape[axis % x.ndim :]]
        return functional.layer_norm(x, shape, scale, bias, eps)

    return Operation(apply, view.present())


def _gemm(view: View) -> Operation:
    alpha, beta = float(view.attribute("alpha", 1.0)), float(view.attribute("beta", 1.0))
    flip_a, flip_b = view.attribute("transA", 0), view.attribute("transB", 0)

    def apply(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        product = (a.T if flip_a else a) @ (b.T if flip_b else b)
        product = product if alpha == 1 else alpha * product
        if c is None:
            return product
        return product + (c if beta == 1 else beta * c)

    return Operation(apply, view.present())


def _matmul(view: View) -> Operation:
    return Operation(lambda a, b: tensor(a) @ tensor(b), (0, 1))


NEURAL: dict[str, Callable[[View], Operation]] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Conv": _conv,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LpNormalization": _lp_normalization,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "ReduceL2": _reduction(_norm),
    "ReduceMean": _reduction(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceSum": _reduction(lambda x, axes, keep: x.sum(axes, keep)),
}
"""Builders by type of operator."""
