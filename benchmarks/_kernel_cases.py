"""What the kernels are measured on, and held against before: prepared inputs, and three ways.

The plain way is the PyTorch reference, which computes the same; sizes are those of Stable Diffusion
1.x at 512x512 unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffveil_kernels import traffic
from diffveil_kernels.calls import (
    Call,
    StepBuffers,
    face_crop_calls,
    face_paste_calls,
    keyed_normal_calls,
    linear_step_calls,
)
from diffveil_kernels.geometry import FaceTable, crop_table, paste_table
from diffveil_kernels.reference.faces import face_crop, face_paste
from diffveil_kernels.reference.keyed_normal import keyed_normal
from diffveil_kernels.reference.linear_step import linear_step
from diffveil_kernels.specs import PARTS

__all__ = ["Case", "kernel_cases"]

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One operation on inputs that lie on the device.

    Attributes:
        name: Kernel and size.
        calls: Our launches; buffers are tensors.
        out: What they write.
        plain: The PyTorch way; returns what ours writes.
        expected: What comes out, computed by NumPy in float64.
        tolerance: Largest difference from it that is allowed.
        bytes: What must be moved.
        prepare: Restores what the calls change in place.
    """

    name: str
    calls: tuple[Call, ...]
    out: torch.Tensor
    plain: Callable[[], torch.Tensor]
    expected: NDArray[np.generic]
    tolerance: float
    bytes: int
    prepare: Callable[[], object] = lambda: None


def kernel_cases(
    device: torch.device | str, *, batch: int = 4, size: int = 512, photo: int = 2048
) -> list[Case]:
    """Every operation once.

    Args:
        device: Where the inputs are put.
        batch: Faces.
        size: Side of a crop in pixels; a latent's is an eighth of it.
        photo: Side of the photos, one a face.
    """
    rng = np.random.default_rng(7)
    return [
        _keyed_normal(rng, device, batch, 4 * (size // 8) ** 2),
        _linear_step(rng, device, batch, size // 8),
        *_faces(rng, device, batch, size, photo),
    ]


def _keyed_normal(rng: np.random.Generator, device: Any, rows: int, count: int) -> Case:
    keys = rng.integers(-(2**31), 2**31, (rows, 8), dtype=np.int32)
    on_device = torch.from_numpy(keys).to(device)
    out = torch.empty((rows, count), device=device)
    expected = keyed_normal(keys, count)
    return Case(
        name=f"keyed_normal {rows}x{count}",
        calls=keyed_normal_calls(on_device, out, rows, count),
        out=out,
        plain=lambda: keyed_normal(on_device, count),
        expected=expected,
        # The reference's logarithm and circle are a library's, up to a unit in the last place.
        tolerance=float(np.spacing(np.abs(expected).max())),
        bytes=traffic.keyed_normal_bytes(rows, count),
    )


def _linear_step(rng: np.random.Generator, device: Any, rows: int, side: int) -> Case:
    shape, plane = (rows, 4, side, side), side * side
    names = list(StepBuffers.__dataclass_fields__)
    inputs: dict[str, NDArray[Any]] = {
        name: rng.normal(size=shape).astype(np.float32) for name in names[:7]
    }
    inputs["mask"] = rng.random((rows, 1, side, side), dtype=np.float32)
    # DDIM with guidance and background, the step that is run most.
    inputs["coefficients"] = np.tile([0.97, 0, -0.05, 0, 0, 0.1, 0, 0], (rows, 1))
    for flag in ("pushed", "normalise", "blend"):
        inputs[flag] = np.ones(rows, dtype=np.float32)
    tensors = {name: torch.from_numpy(value).to(device) for name, value in inputs.items()}
    out = torch.empty(shape, device=device)
    sums = torch.empty((rows, PARTS), dtype=torch.float64, device=device)
    expected = linear_step(**inputs)
    return Case(
        name=f"linear_step {rows}x4x{side}x{side}",
        calls=linear_step_calls(
            StepBuffers(**tensors), sums, out, rows=rows, channels=4, plane=plane
        ),
        out=out,
        plain=lambda: linear_step(**tensors),
        expected=expected,
        tolerance=4 * float(np.spacing(np.abs(expected).max())),
        bytes=traffic.linear_step_bytes(
            rows, 4, plane, terms=1, guided=True, normalised=True, blend=True
        ),
    )


def _faces(rng: np.random.Generator, device: Any, rows: int, size: int, side: int) -> list[Case]:
    shapes = [(side, side)] * rows
    pixels = rng.integers(0, 256, rows * side * side * 3, dtype=np.uint8)
    # Faces that fill most of their photo, turned a little.
    scale = size / (0.6 * side)
    matrices = [_turned(scale, 5.0 * face - 10.0, side / 2.0, size) for face in range(rows)]
    v, u = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    mask = np.clip(4.0 - 10.0 * np.hypot(u, v), 0.0, 1.0).astype(np.float32)
    mask[[0, -1]] = mask[:, [0, -1]] = 0.0
    crops = rng.uniform(-1, 1, (rows, 3, size, size)).astype(np.float16)
    return [
        _crop(pixels, crop_table(shapes, range(rows), matrices, size), device),
        _paste(pixels, crops, mask, paste_table(shapes, range(rows), matrices, mask), device),
    ]


def _crop(pixels: NDArray[np.uint8], table: FaceTable, device: Any) -> Case:
    photos = torch.from_numpy(pixels).to(device)
    out = torch.empty((len(table), 3, table.size, table.size), dtype=torch.float16, device=device)
    return Case(
        name=f"face_crop {len(table)}x3x{table.size}x{table.size} fp16",
        calls=face_crop_calls(photos, *_tables(table, device), out, table, "fp16"),
        out=out,
        plain=lambda: face_crop(photos, table, "float16"),
        expected=face_crop(pixels, table, "float16"),
        tolerance=2.1 / 127.5,
        bytes=traffic.face_crop_bytes(table, 2),
    )


def _paste(
    pixels: NDArray[np.uint8],
    crops: NDArray[np.float16],
    mask: NDArray[np.float32],
    table: FaceTable,
    device: Any,
) -> Case:
    photos, faces = torch.from_numpy(pixels).to(device), torch.from_numpy(crops).to(device)
    weights, out = torch.from_numpy(mask).to(device), photos.clone()
    return Case(
        name=f"face_paste {len(table)}x3x{table.size}x{table.size} fp16",
        calls=face_paste_calls(out, faces, weights, *_tables(table, device), table, "fp16"),
        out=out,
        plain=lambda: face_paste(photos, faces, weights, table),
        expected=face_paste(pixels, crops, mask, table),
        tolerance=2.0,
        bytes=traffic.face_paste_bytes(table, 2),
        prepare=lambda: out.copy_(photos),
    )


def _tables(table: FaceTable, device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers, numbers, and scratch memory for reduced images."""
    return (
        torch.from_numpy(table.integers).to(device),
        torch.from_numpy(table.numbers).to(device),
        torch.empty((len(table), 3, table.capacity), dtype=torch.uint8, device=device),
    )


def _turned(scale: float, degrees: float, middle: float, size: int) -> Matrix:
    angle = math.radians(degrees)
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    linear = np.array([[cosine, -sine], [sine, cosine]])
    shift = (size - 1) / 2 - linear @ np.array([middle, middle])
    return np.concatenate([linear, shift[:, None]], axis=1)
