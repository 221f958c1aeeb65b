"""Cropping and resizing as two constant matrices: A · image · Bᵀ.

Any separable crop, resize or pooling of a fixed size is linear, so a chain of them is one matrix a
dimension. Engines run two matrix products, and the gradient is two more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

__all__ = ["LinearResize", "bicubic", "bilinear", "crop", "pool", "separable_matrix"]

Operation = Callable[[torch.Tensor], torch.Tensor]
"""Maps signals [1, 1, L, n] to [1, 1, L', n] along the third axis."""


def crop(start: int, stop: int) -> Operation:
    """Keep the samples start…stop-1."""
    return lambda x: x[:, :, start:stop]


def bilinear(size: int) -> Operation:
    """Bilinear resize to `size` samples without antialiasing, pixel centres aligned."""
    return lambda x: interpolate(x, (size, x.shape[3]), mode="bilinear", align_corners=False)


def bicubic(size: int) -> Operation:
    """Bicubic resize to `size` samples with antialiasing, as Pillow's."""
    return lambda x: interpolate(
        x, (size, x.shape[3]), mode="bicubic", align_corners=False, antialias=True
    )


def pool(size: int) -> Operation:
    """Adaptive average pooling to `size` samples."""
    return lambda x: adaptive_avg_pool2d(x, (size, x.shape[3]))


def separable_matrix(length: int, *operations: Operation) -> torch.Tensor:
    """The matrix [L', length], float32, of a chain of linear operations: its effect on a basis."""
    basis = torch.eye(length, dtype=torch.float64)[None, None]
    for operation in operations:
        basis = operation(basis)
    return basis[0, 0].to(torch.float32)


class LinearResize(nn.Module):
    """Images [B, C, H, W] to [B, C, H', W'].

    Args:
        rows: Matrix A, [H', H].
        columns: Matrix B, [W', W].
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns.T.contiguous())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """A · image · Bᵀ, channel by channel."""
        return self.rows @ (image @ self.columns)
