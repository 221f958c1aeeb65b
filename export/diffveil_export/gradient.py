"""Turns a module that calls autograd into a graph of ordinary forward operators.

`torch.autograd.grad` runs while `make_fx` records, so the backward pass becomes nodes like any
others. What autograd would record as backward operators, which no ONNX operator matches, is
decomposed; input gradients of convolutions become convolutions, because engines, and ONNX Runtime
on CPUs above all, run those several times faster than transposed convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, interpolate, pad, pixel_shuffle
from torch.overrides import TorchFunctionMode

__all__ = ["conv_input_gradient", "trace_gradient"]

_aten = torch.ops.aten


def conv_input_gradient(
    gradient: torch.Tensor,
    weight: torch.Tensor,
    input_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """Gradient of a 2-D convolution by its input, as one convolution and a pixel shuffle.

    With input position y = s·q + r the chain rule gives

        grad_input[s·q + r] = Σ_d weight[r + p − s·d] · gradient[q + d],

    so each of the s phases r is a stride-1 convolution of the output gradient with a sub-sampled,
    reversed kernel; together they are one convolution to s times the channels a dimension, then
    a pixel shuffle (the sub-pixel view of transposed convolution: Shi et al., arXiv 1609.07009).
    The re-arranged kernel depends on nothing but the weight, so engines fold it at load and the
    file stores every weight once. Stride 1 leaves the familiar reversed kernel, and no shuffle.

    Args:
        gradient: Gradient by the convolution's output, [B, O, h, w].
        weight: The convolution's weight, [O, I/groups, kh, kw].
        input_size: Height and width of the convolution's input, pixels.
        stride: s in both dimensions, pixels; both must be equal.
        padding: p in both dimensions, pixels.
        groups: Groups of the convolution.

    Returns:
        Gradient by the convolution's input, [B, I, height, width].
    """
    s = stride[0]
    taps, pads = [], []
    for k, p, length, out in zip(
        weight.shape[2:], padding, input_size, gradient.shape[2:], strict=True
    ):
        low, high = -((k - 1 - p) // s), (s - 1 + p) // s
        index = [[r + p - s * d for d in range(low, high + 1)] for r in range(s)]
        taps.append([[u if 0 <= u < k else k for u in phase] for phase in index])
        pads.append((-low, -(-length // s) + high - int(out)))

    if s == 1 and all(t[0] == [*range(len(t[0]))][::-1] for t in taps):
        kernel = weight.flip(2, 3)
    else:
        # Index k is a row of zeros: the taps that a phase does not have.
        kernel = pad(weight, (0, 1, 0, 1))
        for dim, rows in zip((2, 3), taps, strict=True):
            kernel = kernel.index_select(dim, torch.tensor([u for row in rows for u in row]))
    (mh, mw), outer, inner = (len(t[0]) for t in taps), weight.shape[0], weight.shape[1]
    kernel = kernel.reshape(groups, outer // groups, inner, s, mh, s, mw)
    kernel = kernel.permute(0, 2, 3, 5, 1, 4, 6)
    kernel = kernel.reshape(groups * inner * s * s, outer // groups, mh, mw)

    (top, bottom), (left, right) = pads
    if (top, left) == (bottom, right) and min(top, left) >= 0:
        result = conv2d(gradient, kernel, padding=(top, left), groups=groups)
    else:
        result = conv2d(pad(gradient, (left, right, top, bottom)), kernel, groups=groups)
    if s > 1:
        result = pixel_shuffle(result, s)
        result = result[:, :, : input_size[0], : input_size[1]]
    return result


def _convolution_backward(
    gradient: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> Any:
    """Replaces `aten::convolution_backward` where only the input's gradient is asked for."""
    if output_mask[1] or output_mask[2]:
        return NotImplemented  # weights are frozen in every graph that is exported
    if transposed:  # the gradient of a transposed convolution is the plain one
        result = _aten.convolution(
            gradient, weight, None, stride, padding, dilation, False, [0] * len(stride), groups
        )
        return result, None, None
    if len(stride) == 2 and set(dilation) == {1} and stride[0] == stride[1]:
        height, width = (int(n) for n in features.shape[2:])
        result = conv_input_gradient(
            gradient,
            weight,
            (height, width),
            (stride[0], stride[1]),
            (padding[0], padding[1]),
            groups,
        )
        return result, None, None
    extra = [
        int(n) - ((int(g) - 1) * s - 2 * p + d * (int(k) - 1) + 1)
        for n, g, s, p, d, k in zip(
            features.shape[2:],
            gradient.shape[2:],
            stride,
            padding,
            dilation,
            weight.shape[2:],
            strict=True,
        )
    ]
    result = _aten.convolution(
        gradient, weight, None, stride, padding, dilation, True, extra, groups
    )
    return result, None, None


def _slice_backward(
    gradient: torch.Tensor, input_sizes: list[int], dim: int, start: int, end: int, step: int
) -> Any:
    """Replaces `aten::slice_backward`: padding is one node, scattering is many."""
    size = input_sizes[dim]
    if gradient.shape[dim] == size and step == 1:  # all of it was kept
        return gradient.clone()
    if not isinstance(size, int):
        return NotImplemented  # a part of the batch: computing with its size would fix it
    start = max(0, start + size if start < 0 else min(start, size))
    if step > 1:  # put step - 1 zeros behind every element
        count = int(gradient.shape[dim])
        behind = [0, 0] * (gradient.ndim - 1 - dim) + [0, step - 1]
        gradient = _aten.constant_pad_nd(gradient.unsqueeze(dim + 1), behind)
        gradient = gradient.flatten(dim, dim + 1).narrow(dim, 0, (count - 1) * step + 1)
    after = size - start - int(gradient.shape[dim])
    behind = [0, 0] * (gradient.ndim - 1 - dim) + [start, after]
    return _aten.constant_pad_nd(gradient, behind)


class _Repetition(TorchFunctionMode):
    """Enlarges by repeating pixels, where `interpolate` would index them.

    PyTorch writes nearest-neighbour interpolation as indexing while shapes are symbols. The way
    back then scatters with addition, which TensorRT does not know; that of repeating is a sum.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = _repeated(*args, **kwargs) if func is interpolate else None
        return func(*args, **kwargs) if result is None else result


def _repeated(
    x: torch.Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    *_: Any,
    **__: Any,
) -> torch.Tensor | None:
    """Nearest-neighbour interpolation by whole factors; None for any other."""
    if not mode.startswith("nearest") or x.ndim != 4:
        return None
    height, width = (int(n) for n in x.shape[2:])
    if size is not None:
        wanted = (size, size) if isinstance(size, int) else tuple(size)
        factors = [n / length for n, length in zip(wanted, (height, width), strict=True)]
    else:
        factors = [scale_factor] * 2 if isinstance(scale_factor, int | float) else [*scale_factor]
    if any(f < 1 or f != int(f) for f in factors):
        return None
    down, across = (int(f) for f in factors)
    cells = x.reshape(-1, x.shape[1], height, 1, width, 1)
    cells = cells.expand(-1, -1, -1, down, -1, across)
    return cells.reshape(-1, x.shape[1], height * down, width * across)


def _upsample_nearest_backward(
    gradient: torch.Tensor, output_size: list[int], input_size: list[int], *scales: float | None
) -> Any:
    """Replaces `aten::upsample_nearest2d_backward` for whole factors: the sum of each cell."""
    (high, wide), (h, w) = output_size, input_size[2:]
    if high % h or wide % w:
        return NotImplemented
    return gradient.reshape(-1, input_size[1], h, high // h, w, wide // w).sum((3, 5))


def _pair(values: list[int], default: list[int] | None = None) -> tuple[int, int]:
    """Sizes for both dimensions; ATen writes equal ones once, and none for the default."""
    values = values or default or [0]
    return int(values[0]), int(values[-1])


def _average_pool_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Any:
    """Replaces `aten::avg_pool2d_backward`: that of a convolution with ones, over the counts."""
    if x.ndim != 4:
        return NotImplemented
    k, p = _pair(kernel), _pair(padding)
    s = _pair(stride, kernel)
    if s[0] != s[1]:
        return NotImplemented
    size = (int(x.shape[2]), int(x.shape[3]))
    counts = []
    for axis in range(2):
        starts = [i * s[axis] - p[axis] for i in range(int(gradient.shape[2 + axis]))]
        ends = [min(start + k[axis], size[axis] + p[axis]) for start in starts]
        if not count_include_pad:
            starts = [max(start, 0) for start in starts]
            ends = [min(end, size[axis]) for end in ends]
        counts.append([end - start for start, end in zip(starts, ends, strict=True)])
    if divisor is not None:
        gradient = gradient / divisor
    elif all(len(set(row)) == 1 for row in counts):
        gradient = gradient / (counts[0][0] * counts[1][0])
    else:
        rows, columns = (torch.tensor(row, dtype=x.dtype, device=x.device) for row in counts)
        gradient = gradient / (rows[:, None] * columns)
    ones = torch.ones(int(x.shape[1]), 1, *k, dtype=x.dtype, device=x.device)
    return conv_input_gradient(gradient, ones, size, s, p, int(x.shape[1]))


def _max_pool_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    indices: torch.Tensor,
) -> Any:
    """Replaces `aten::max_pool2d_with_indices_backward`, without the indices.

    Every place of the window in turn takes the gradient of the windows whose maximum lies there,
    and what is taken is gone: of equal numbers the first one in the window gets all, as in ATen.
    """
    if x.ndim != 4:
        return NotImplemented
    k, p, d = _pair(kernel), _pair(padding), _pair(dilation)
    s = _pair(stride, kernel)
    peak, _ = _aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
    out = [int(n) for n in gradient.shape[2:]]
    # The last window may end before the padded image does, or in ceil mode after it.
    sizes = [
        max((out[a] - 1) * s[a] + (k[a] - 1) * d[a] + 1, int(x.shape[2 + a]) + p[a])
        for a in range(2)
    ]
    behind = [sizes[a] - int(x.shape[2 + a]) - p[a] for a in range(2)]
    padded = _aten.constant_pad_nd(x, [p[1], behind[1], p[0], behind[0]], float("-inf"))
    total = None
    for i in range(k[0]):
        for j in range(k[1]):
            top, left = i * d[0], j * d[1]
            bottom, right = top + (out[0] - 1) * s[0] + 1, left + (out[1] - 1) * s[1] + 1
            hit = padded[:, :, top : bottom : s[0], left : right : s[1]] == peak
            taken = torch.where(hit, gradient, torch.zeros_like(gradient))
            gradient = gradient - taken
            wide = _slice_backward(taken, [0, 0, out[0], sizes[1]], 3, left, right, s[1])
            placed = _slice_backward(wide, [0, 0, *sizes], 2, top, bottom, s[0])
            total = placed if total is None else total + placed
    return _aten.constant_pad_nd(total, [-p[1], -behind[1], -p[0], -behind[0]])


def _silu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Replaces `aten::silu_backward`: y + σ − y·σ reuses y and σ of the forward pass."""
    sigmoid = x.sigmoid()
    y = x * sigmoid
    return gradient * (y + sigmoid * (1 - y))


def _decompositions() -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = dict(
        get_decompositions(
            [
                _aten.native_group_norm_backward,
                _aten.native_layer_norm_backward,
                _aten.native_batch_norm_backward,
                _aten.gelu_backward,
                _aten.sigmoid_backward,
                _aten.tanh_backward,
                _aten.threshold_backward,
                _aten.leaky_relu_backward,
                _aten.elu_backward,
                _aten.hardtanh_backward,
                _aten.hardswish_backward,
                _aten.mish_backward,
                _aten.softplus_backward,
                _aten._softmax_backward_data,
                _aten._prelu_kernel_backward,
                _aten.select_backward,
                _aten.embedding_dense_backward,
                _aten.unfold_backward,
                _aten.upsample_bilinear2d_backward,
                _aten.linalg_vector_norm,
                _aten.triu,
            ]
        )
    )
    table[_aten.convolution_backward.default] = _convolution_backward
    table[_aten.slice_backward.default] = _slice_backward
    table[_aten.upsample_nearest2d_backward.default] = _upsample_nearest_backward
    table[_aten.silu_backward.default] = _silu_backward
    table[_aten.avg_pool2d_backward.default] = _average_pool_backward
    table[_aten.max_pool2d_with_indices_backward.default] = _max_pool_backward
    return table


def trace_gradient(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], dynamic: tuple[tuple[int, ...], ...]
) -> GraphModule:
    """Record `module`, whose forward calls autograd, as a graph without autograd.

    Nothing is computed: tensors are fakes, so a full-size model is traced in little memory. The
    module's weights stay as they are and become attributes of the graph.

    Args:
        module: In evaluation mode, with frozen weights.
        inputs: Example inputs, with a batch of at least two (0 and 1 are special to PyTorch).
        dynamic: For each input the dimensions that are the batch.

    Returns:
        A module with the same inputs and outputs.

    Raises:
        ValueError: The module computes something else for other batches: the graph would be wrong.
    """
    shapes = ShapeEnv(duck_shape=True)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    fakes = tuple(
        mode.from_tensor(
            tensor,
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=[
                    DimDynamic.DUCK if d in dims else DimDynamic.STATIC for d in range(tensor.ndim)
                ]
            ),
        )
        for tensor, dims in zip(inputs, dynamic, strict=True)
    )
    with sdpa_kernel(SDPBackend.MATH), mode, _Repetition():
        graph = make_fx(
            module,
            decomposition_table=_decompositions(),
            tracing_mode="symbolic",
            _allow_non_fake_inputs=True,
        )(*fakes)
    if shapes.replacements:
        raise ValueError(f"tracing fixed the size of a dynamic axis: {shapes.replacements}")
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
