"""The operations on PyTorch tensors, by Triton's own compiler and launcher.

For tests and measurements: on a GPU, or interpreted on CPU tensors where Triton was told to
(``TRITON_INTERPRET=1`` before this package's `jit` modules are imported). The runtime uses
`diffveil_kernels.launch` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch

from diffveil_kernels.calls import (
    Call,
    StepBuffers,
    face_crop_calls,
    face_paste_calls,
    keyed_normal_calls,
    linear_step_calls,
)
from diffveil_kernels.errors import KernelInputError
from diffveil_kernels.geometry import FaceTable
from diffveil_kernels.specs import PARTS, SPECS

__all__ = ["face_crop", "face_paste", "keyed_normal", "linear_step", "run"]

_KINDS = {torch.float16: "fp16", torch.float32: "fp32"}


def run(calls: Sequence[Call]) -> None:
    """Launch calls whose buffers are tensors, in order, on PyTorch's current stream."""
    for call in calls:
        spec = SPECS[call.kernel]
        kernel = getattr(import_module(f"diffveil_kernels.jit.{spec.module}"), spec.function)
        kernel[call.grid](
            *call.arguments,
            **spec.constants,
            num_warps=spec.num_warps,
            enable_fp_fusion=False,
        )


def keyed_normal(keys: torch.Tensor, count: int) -> torch.Tensor:
    """See `diffveil_kernels.reference.keyed_normal.keyed_normal`.

    Raises:
        KernelInputError: The keys are not contiguous int32 [N, 8], or there are too many numbers.
    """
    _check("keys", keys, torch.int32, (None, 8))
    out = torch.empty((len(keys), count), dtype=torch.float32, device=keys.device)
    run(keyed_normal_calls(keys, out, len(keys), count))
    return out


def linear_step(
    latent: torch.Tensor,
    previous: torch.Tensor,
    epsilon: torch.Tensor,
    previous_epsilon: torch.Tensor,
    noise: torch.Tensor,
    gradient: torch.Tensor,
    background: torch.Tensor,
    mask: torch.Tensor,
    coefficients: torch.Tensor,
    pushed: torch.Tensor,
    normalise: torch.Tensor,
    blend: torch.Tensor,
) -> torch.Tensor:
    """See `diffveil_kernels.reference.linear_step.linear_step`.

    Raises:
        KernelInputError: A tensor is not contiguous, or has another shape or dtype.
    """
    tensors = StepBuffers(
        *(latent, previous, epsilon, previous_epsilon, noise, gradient, background, mask),
        *(coefficients, pushed, normalise, blend),
    )
    _check("latent", latent, torch.float32, (None, None, None, None))
    rows, channels, height, width = latent.shape
    for name in StepBuffers.__dataclass_fields__:
        shape: tuple[int, ...] = (rows, channels, height, width)
        if name == "mask":
            shape = (rows, 1, height, width)
        elif name == "coefficients":
            shape = (rows, 8)
        elif name in ("pushed", "normalise", "blend"):
            shape = (rows,)
        dtype = torch.float64 if name == "coefficients" else torch.float32
        _check(name, getattr(tensors, name), dtype, shape)
    out = torch.empty_like(latent)
    sums = torch.empty((rows, PARTS), dtype=torch.float64, device=latent.device)
    run(linear_step_calls(tensors, sums, out, rows=rows, channels=channels, plane=height * width))
    return out


def face_crop(photos: torch.Tensor, table: FaceTable, dtype: str = "float32") -> torch.Tensor:
    """See `diffveil_kernels.reference.faces.face_crop`.

    Raises:
        KernelInputError: The photos are not those of the table.
    """
    _check("photos", photos, torch.uint8, (table.elements,))
    out = torch.empty(
        (len(table), 3, table.size, table.size), dtype=getattr(torch, dtype), device=photos.device
    )
    tables = _uploaded(table, photos)
    run(face_crop_calls(photos, *tables, out, table, _KINDS[out.dtype]))
    return out


def face_paste(
    photos: torch.Tensor, crops: torch.Tensor, mask: torch.Tensor, table: FaceTable
) -> torch.Tensor:
    """See `diffveil_kernels.reference.faces.face_paste`; the photos are copied first.

    Raises:
        KernelInputError: Photos, crops or mask are not those of the table.
    """
    _check("photos", photos, torch.uint8, (table.elements,))
    if crops.dtype not in _KINDS:
        raise KernelInputError(f"crops: received {crops.dtype}, expected float16 or float32")
    _check("crops", crops, crops.dtype, (len(table), 3, table.size, table.size))
    _check("mask", mask, torch.float32, (table.size, table.size))
    out = photos.clone()
    tables = _uploaded(table, photos)
    run(face_paste_calls(out, crops, mask, *tables, table, _KINDS[crops.dtype]))
    return out


def _uploaded(
    table: FaceTable, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A table's integers and numbers where `like` is, and scratch memory for its reduced images."""
    reduced = torch.empty((len(table), 3, table.capacity), dtype=torch.uint8, device=like.device)
    integers, numbers = torch.from_numpy(table.integers), torch.from_numpy(table.numbers)
    return integers.to(like.device), numbers.to(like.device), reduced


def _check(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int | None]
) -> None:
    fits = len(shape) == tensor.ndim and all(
        wanted is None or wanted == axis for wanted, axis in zip(shape, tensor.shape, strict=False)
    )
    if not fits or tensor.dtype != dtype or not tensor.is_contiguous():
        wanted = ["N" if axis is None else axis for axis in shape]
        raise KernelInputError(
            f"{name}: received {tensor.dtype} {list(tensor.shape)}"
            f"{'' if tensor.is_contiguous() else ', not contiguous'}; expected contiguous {dtype} "
            f"{wanted}"
        )
