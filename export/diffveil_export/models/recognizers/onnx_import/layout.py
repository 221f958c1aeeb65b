"""ONNX operators that move numbers: shapes, slices, joins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from diffveil_export.models.recognizers.onnx_import.values import (
    HostArray,
    Operation,
    Value,
    View,
    host,
    objects,
    tensor,
)

__all__ = ["LAYOUT", "MAX_ELEMENTS"]

MAX_ELEMENTS = 1 << 28
"""Most numbers in one value: a file must not be able to ask for all memory."""

_FEW_RUNS = 8


def _reshape(view: View) -> Operation:
    zero_copies = not view.attribute("allowzero", 0)
    keep_batch = _fixes_batch(view)

    def apply(x: Value, shape: Value) -> Value:
        sizes = list(host(shape).reshape(-1).tolist())
        if zero_copies:
            sizes = [
                x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(sizes)
            ]
        if keep_batch:
            sizes[0] = x.shape[0]
        return x.reshape(sizes)

    return Operation(apply, (0, 1))


def _fixes_batch(view: View) -> bool:
    """Whether a reshape to [1, …] means the batch, in a graph exported for a batch of one.

    It does where the batch is the tensor's first axis and the other sizes are those of one image.
    """
    if not view.is_constant(1) or not view.batch_first(0):
        return False
    sizes = [int(n) for n in view.constant(1).reshape(-1)]
    if not sizes or sizes[0] != 1:
        return False
    shape = view.shape(0)
    copied = [shape[i] if n == 0 and i < len(shape) else n for i, n in enumerate(sizes)]
    return -1 in copied[1:] or math.prod(copied[1:]) == math.prod(shape[1:])


def _flatten(view: View) -> Operation:
    axis = int(view.attribute("axis", 1))

    def apply(x: torch.Tensor) -> torch.Tensor:
        start = axis % x.ndim if axis < 0 else axis
        if start == 1:
            return x.flatten(1)
        return x.reshape(math.prod(x.shape[:start]), math.prod(x.shape[start:]))

    return Operation(apply, (0,))


def _transpose(view: View) -> Operation:
    order = view.attribute("perm")

    def apply(x: Value) -> Value:
        axes = list(order) if order is not None else list(range(x.ndim))[::-1]
        return x.permute(axes) if isinstance(x, torch.Tensor) else x.transpose(axes)

    return Operation(apply, (0,))


def _concat(view: View) -> Operation:
    axis = int(view.attribute("axis", 0))

    def apply(*parts: Value) -> Value:
        if any(isinstance(part, torch.Tensor) for part in parts):
            return torch.cat([tensor(part) for part in parts], axis)
        return np.concatenate([host(part) for part in parts], axis)

    return Operation(apply, view.present())


def _split(view: View) -> Operation:
    axis, sizes, count = (
        int(view.attribute("axis", 0)),
        view.whole(1, "split"),
        len(view.node.outputs),
    )

    def apply(x: torch.Tensor) -> list[torch.Tensor]:
        parts = sizes
        if parts is None:
            step = -(-int(x.shape[axis]) // count)
            parts = [step] * (count - 1)
            parts.append(int(x.shape[axis]) - sum(parts))
        return list(torch.split(x, parts, axis))

    return Operation(apply, (0,))


def _slice(view: View) -> Operation:
    starts, ends = view.whole(1, "starts"), view.whole(2, "ends")
    if starts is None or ends is None:
        raise view.error("starts and ends are missing")
    axes = view.whole(3, "axes") or list(range(len(starts)))
    steps = view.whole(4, "steps") or [1] * len(starts)

    def apply(x: Value) -> Value:
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            x = _slice_axis(x, axis % x.ndim, start, end, step)
        return x

    return Operation(apply, (0,))


def _slice_axis(x: Value, axis: int, start: int, end: int, step: int) -> Value:
    if start == 0 and step == 1 and end >= 2**31 - 1:
        return x  # all of an axis, which may be the batch
    # ONNX ends a backward slice at an end below -length, as Python does.
    chosen = range(int(x.shape[axis]))[slice(start, end, step)]

    def cut(start: int, end: int, step: int) -> Value:
        index = (*[slice(None)] * axis, slice(start, end, step))
        result: Value = x[index]
        return result

    if step > 0 or not isinstance(x, torch.Tensor):
        return cut(start, end, step)
    if not chosen:
        return cut(0, 0, 1)
    return torch.flip(torch.as_tensor(cut(chosen[-1], chosen[0] + 1, -step)), (axis,))


def _gather(view: View) -> Operation:
    axis = int(view.attribute("axis", 0))
    indices = view.constant(1).astype(np.int64)

    def apply(x: Value) -> Value:
        if not isinstance(x, torch.Tensor):
            return np.asarray(np.take(x, indices, axis))
        return _gather_tensor(x, indices, axis % x.ndim)

    return Operation(apply, (0,))


def _gather_tensor(x: torch.Tensor, indices: HostArray, axis: int) -> torch.Tensor:
    """Slices, or one product with a constant matrix: their gradients are ordinary operators."""
    length = int(x.shape[axis])
    flat = [int(i) % length for i in indices.reshape(-1)]
    starts = [k for k, i in enumerate(flat) if k == 0 or i != flat[k - 1] + 1]
    if len(starts) <= _FEW_RUNS:
        ends = [*starts[1:], len(flat)]
        parts = [x.narrow(axis, flat[a], b - a) for a, b in zip(starts, ends, strict=True)]
        result = parts[0] if len(parts) == 1 else torch.cat(parts, axis)
    else:
        chosen = torch.zeros(length, len(flat), dtype=x.dtype, device=x.device)
        chosen[flat, list(range(len(flat)))] = 1
        result = (x.movedim(axis, -1) @ chosen).movedim(-1, axis)
    if indices.ndim == 1:
        return result
    return result.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _unsqueeze(view: View) -> Operation:
    axes = view.whole(1, "axes") or []

    def apply(x: Value) -> Value:
        rank = x.ndim + len(axes)
        places = sorted(a % rank for a in axes)
        if not isinstance(x, torch.Tensor):
            return np.expand_dims(x, tuple(places))
        for place in places:
            x = x.unsqueeze(place)
        return x

    return Operation(apply, (0,))


def _squeeze(view: View) -> Operation:
    axes = view.whole(1, "axes")
    if view.traced(0):  # a batch of one, if it was, is not removed
        shape = view.shape(0)
        places = range(len(shape)) if axes is None else [a % len(shape) for a in axes]
        axes = [a for a in places if shape[a] == 1]

    def apply(x: Value) -> Value:
        if not isinstance(x, torch.Tensor):
            return np.squeeze(x, None if axes is None else tuple(axes))
        places = [i for i, n in enumerate(x.shape) if n == 1] if axes is None else axes
        return x.squeeze(tuple(places)) if places else x

    return Operation(apply, (0,))


def _shape(view: View) -> Operation:
    start, end = int(view.attribute("start", 0)), view.attribute("end")
    return Operation(lambda x: objects(list(x.shape)[start:end]), (0,))


def _expand(view: View) -> Operation:
    def apply(x: torch.Tensor, shape: Value) -> torch.Tensor:
        sizes = list(host(shape).reshape(-1).tolist())
        own = [1] * (len(sizes) - x.ndim) + list(x.shape)
        sizes = [1] * (len(own) - len(sizes)) + sizes
        # Either side may be the one that is repeated.
        final = [o if isinstance(n, int) and n == 1 else n for o, n in zip(own, sizes, strict=True)]
        return x.expand(final)

    return Operation(apply, (0, 1))


def _constant_of_shape(view: View) -> Operation:
    value = np.asarray(view.attribute("value", np.zeros(1, np.float32)))
    shape = [int(n) for n in view.constant(0).reshape(-1)]
    if math.prod(shape) > MAX_ELEMENTS:
        raise view.error(f"asks for {math.prod(shape)} numbers, at most {MAX_ELEMENTS} are allowed")

    def apply() -> Value:
        filled = np.full(shape, value.reshape(-1)[0], value.dtype)
        return torch.from_numpy(filled) if filled.dtype == np.float32 else filled

    return Operation(apply, ())


def _pad(view: View) -> Operation:
    view.require(mode="constant")
    pads = view.whole(1, "pads")
    value = view.real(2, "value", 0.0)
    if pads is None:
        raise view.error("pads are missing")
    axes = view.whole(3, "axes") or list(range(len(pads) // 2))

    def apply(x: torch.Tensor) -> torch.Tensor:
        amounts = [0, 0] * x.ndim  # the last axis comes first
        for i, axis in enumerate(axes):
            place = 2 * (x.ndim - 1 - axis % x.ndim)
            amounts[place : place + 2] = pads[i], pads[i + len(axes)]
        while amounts and amounts[-2:] == [0, 0]:
            del amounts[-2:]
        return pad(x, amounts, value=value or 0.0) if amounts else x

    return Operation(apply, (0,))


def _resize(view: View) -> Operation:
    """Whole factors by repetition only."""
    view.require(mode="nearest")
    places = view.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = view.attribute("nearest_mode", "round_prefer_floor")
    if (places, rounding) not in {("asymmetric", "floor"), ("half_pixel", "round_prefer_floor")}:
        raise view.error(f"'{places}' with '{rounding}' is not repetition")
    shape, old = view.shape(0), view.opset == 10
    if old or (view.has(2) and view.constant(2).size):
        factors = [float(f) for f in view.constant(1 if old else 2).reshape(-1)]
    elif view.has(3):
        sizes = view.constant(3).reshape(-1)
        factors = [1.0, *(float(n) / o for n, o in zip(sizes[1:], shape[1:], strict=True))]
    else:
        raise view.error("neither scales nor sizes are constant")
    whole = [int(f) for f in factors]
    if len(whole) != 4 or whole != factors or whole[:2] != [1, 1]:
        raise view.error(f"factors {factors}: only whole factors of height and width are supported")
    up, across = whole[2:]

    def apply(x: torch.Tensor) -> torch.Tensor:
        _, c, h, w = x.shape
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, up, -1, across)
        return x.reshape(-1, c, h * up, w * across)

    return Operation(apply, (0,))


def _constant(view: View) -> Operation:
    attributes: dict[str, Any] = dict(view.node.attributes)
    if len(attributes) != 1 or not set(attributes) <= {
        "value",
        "value_float",
        "value_floats",
        "value_int",
        "value_ints",
    }:
        raise view.error(f"a value of the kind {sorted(attributes)} is not supported")
    value = np.asarray(next(iter(attributes.values())))
    if value.dtype.kind == "f":
        return Operation(lambda: torch.from_numpy(value.astype(np.float32)), ())
    return Operation(lambda: value.astype(np.int64), ())


LAYOUT: dict[str, Callable[[View], Operation]] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""Builders by type of operator."""
