"""Programs in 16-bit arithmetic: which operations round, and which stay islands of float32.

Types are decided while a network runs, so they stand in the graph itself (engines with strongly
typed networks have no precision flags any more) and autograd gives the backward pass the same
islands. Weights stay float32 in PyTorch; their casts become 16-bit weights when a graph is saved.

1. Convolutions and matrix products compute in 16 bits.
2. Norms, softmax, sums and means compute in float32 and return 16 bits: squares and sums overflow
   float16 beyond 65,504, and exponentials lose the tail.
3. Unit normalisation of an embedding returns float32, as does everything computed from it.
4. Any other operation computes in 16 bits if one of its arguments has 16 bits, so that what begins
   in float32 (timestep embeddings) stays there until it meets an activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from diffveil.errors import OptionError

__all__ = [
    "PRECISIONS",
    "InPrecision",
    "Precision",
    "arithmetic",
    "choose_loss_scale",
    "float_dtype",
]

Precision = Literal["float32", "float16", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_HEADROOM = 16
"""How far below the largest float16 the largest gradient is put: photos differ from the probe."""

_Function = Any  # PyTorch's functions: builtins, methods and Python functions

_PRODUCTS: frozenset[_Function] = frozenset(
    {
        F.conv1d,
        F.conv2d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.linear,
        F.bilinear,
        torch.addbmm,
        torch.addmm,
        torch.baddbmm,
        torch.bmm,
        torch.conv1d,
        torch.conv2d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.einsum,
        torch.matmul,
        torch.mm,
        torch.Tensor.__matmul__,
        torch.Tensor.__rmatmul__,
        torch.Tensor.addbmm,
        torch.Tensor.addmm,
        torch.Tensor.baddbmm,
        torch.Tensor.bmm,
        torch.Tensor.matmul,
        torch.Tensor.mm,
    }
)

_ISLANDS: frozenset[_Function] = frozenset(
    {
        F.adaptive_avg_pool2d,
        F.avg_pool2d,
        F.group_norm,
        F.instance_norm,
        F.layer_norm,
        F.log_softmax,
        F.multi_head_attention_forward,
        F.softmax,
        torch.group_norm,
        torch.layer_norm,
        torch.logsumexp,
        torch.mean,
        torch.softmax,
        torch.std,
        torch.sum,
        torch.var,
        torch.var_mean,
        torch.Tensor.logsumexp,
        torch.Tensor.mean,
        torch.Tensor.softmax,
        torch.Tensor.std,
        torch.Tensor.sum,
        torch.Tensor.var,
    }
    | ({F.rms_norm} if hasattr(F, "rms_norm") else set())
)

_UNITS: frozenset[_Function] = frozenset(
    {
        F.cosine_similarity,
        F.normalize,
        torch.cosine_similarity,
        torch.linalg.norm,
        torch.linalg.vector_norm,
        torch.norm,
        torch.Tensor.norm,
    }
)

_CONVERSIONS = frozenset(
    {"to", "type", "type_as", "float", "half", "double", "bfloat16", "__get__"}
)


def float_dtype(precision: Precision) -> torch.dtype:
    """The PyTorch dtype of a precision.

    Raises:
        OptionError: There is no such precision.
    """
    if precision not in _DTYPES:
        raise OptionError(f"precision: received '{precision}', expected one of {PRECISIONS}")
    return _DTYPES[precision]


class _Arithmetic(TorchFunctionMode):
    """Applies the rules of this module to every PyTorch call below it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self,
        func: _Function,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(self.dtype, *args, **kwargs)
        if func in _PRODUCTS:
            return func(*_cast(args, self.dtype), **_cast(kwargs, self.dtype))
        if func in _UNITS or func in _ISLANDS:
            result = func(*_cast(args, torch.float32), **_cast(kwargs, torch.float32))
            if func in _UNITS or not _has(self.dtype, (args, kwargs)):
                return result
            return _cast(result, self.dtype)
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or name in _CONVERSIONS or not _has(self.dtype, (args, kwargs)):
            return func(*args, **kwargs)
        return func(*_cast(args, self.dtype), **_cast(kwargs, self.dtype))


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in _DTYPES.values()


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if _floating(x) and x.dtype != dtype else x, tree)


def _has(dtype: torch.dtype, tree: Any) -> bool:
    """Whether a tensor of this dtype is anywhere in the arguments."""
    if isinstance(tree, torch.Tensor):
        return tree.dtype == dtype
    if isinstance(tree, Mapping):
        return any(_has(dtype, value) for value in tree.values())
    if isinstance(tree, (tuple, list)):
        return any(_has(dtype, value) for value in tree)
    return False


def _attention(
    dtype: torch.dtype,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Softmax(q·kᵀ/√d + mask)·v with products in `dtype` and softmax in float32.

    The factor is split between query and key before their product, which then cannot be larger
    than the scores themselves.
    """
    if dropout_p or enable_gqa:
        raise OptionError("attention with dropout or grouped queries has no 16-bit form here")
    factor = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    q, k, v = (x.to(dtype) for x in (query, key, value))
    scores = ((q * factor) @ (k * factor).transpose(-2, -1)).float()
    if is_causal:
        rows, columns = scores.shape[-2:]
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask.float()
    result: torch.Tensor = scores.softmax(-1).to(dtype) @ v
    return result


@contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """Everything that PyTorch computes inside the block follows the rules of this module.

    Tensors may enter in float32; results are 16-bit or float32, as the rules have it.

    Raises:
        OptionError: There is no such precision.
    """
    dtype = float_dtype(precision)
    with nullcontext() if dtype == torch.float32 else _Arithmetic(dtype):
        yield


class InPrecision(nn.Module):
    """A program's module computing in `precision`, its inputs and outputs in float32.

    Args:
        module: Weights in float32; takes and returns tensors.
        precision: Type of the arithmetic.
    """

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        super().__init__()
        float_dtype(precision)
        self.module, self.precision = module, precision

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What `module` returns, in float32."""
        with arithmetic(self.precision):
            result = self.module(*inputs)
        return _cast(result, torch.float32)


def choose_loss_scale(
    guide: nn.Module, inputs: tuple[torch.Tensor, ...], parts: Sequence[nn.Module]
) -> tuple[float, tuple[torch.Tensor, ...]]:
    """The power of two by which the energy is multiplied so that float16 gradients survive.

    Gradients of single pixels are around 10⁻⁷, where float16 has a digit or none. The largest
    gradient anywhere in the network decides: it is put a factor of 16 below the largest float16,
    which leaves the smallest ones as much room as there is (Micikevicius et al. 2018, loss
    scaling).

    Args:
        guide: The module of program `guide`, in float32, with a loss scale of 1.
        inputs: Its inputs, as photos might give them.
        parts: The networks that `guide` goes through.

    Returns:
        A power of two from 1 to 2²⁴, and the outputs of `guide`.
    """
    largest = 0.0

    def look(gradient: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, float(gradient.abs().max()))

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            register: Any = output.register_hook
            register(look)

    leaves = [m for part in parts for m in part.modules() if not list(m.children())]
    handles = [m.register_forward_hook(watch) for m in leaves]
    try:
        outputs: tuple[torch.Tensor, ...] = guide(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    look(outputs[0])
    if not largest > 0 or largest == float("inf"):
        return 1.0, outputs
    room = torch.finfo(torch.float16).max / _HEADROOM / largest
    exponent = torch.tensor(room, dtype=torch.float64).log2().floor().clamp(0, 24)
    return float(2.0 ** int(exponent)), outputs
