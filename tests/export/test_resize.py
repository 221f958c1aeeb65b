"""Matrices that crop and resize against PyTorch's own operators."""

from __future__ import annotations

import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from diffveil_export.resize import LinearResize, bicubic, bilinear, crop, pool, separable_matrix


def test_a_chain_is_one_matrix() -> None:
    image = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    rows = separable_matrix(96, bilinear(256), crop(35, 223), pool(112))
    columns = separable_matrix(96, bilinear(256), crop(32, 220), pool(112))
    large = interpolate(image, (256, 256), mode="bilinear", align_corners=False)
    expected = adaptive_avg_pool2d(large[:, :, 35:223, 32:220], (112, 112))
    torch.testing.assert_close(LinearResize(rows, columns)(image), expected, rtol=1e-5, atol=1e-5)


def test_bicubic_antialiases() -> None:
    image = torch.rand(1, 3, 90, 90, generator=torch.Generator().manual_seed(2))
    matrix = separable_matrix(90, bicubic(40))
    expected = interpolate(image, (40, 40), mode="bicubic", antialias=True)
    torch.testing.assert_close(LinearResize(matrix, matrix)(image), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix.sum(1), torch.ones(40))
