"""ArcFace's IR-SE50 recognizer: a 50-layer residual network with squeeze and excitation.

Deng et al., "ArcFace", arXiv 1801.07698, and Hu et al., "Squeeze-and-Excitation Networks",
arXiv 1709.01507. Parameters are named as in the usual weight files (`input_layer.0`,
`body.0.res_layer.1`, `output_layer.3`, …).
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["IRSE50"]

_STAGES = ((64, 3), (128, 4), (256, 14), (512, 3))


class _Excitation(nn.Module):
    """Scales channels by what their means say."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale: torch.Tensor = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * scale


class _Subsample(nn.Module):
    """Every stride-th pixel, without parameters."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]


class _Bottleneck(nn.Module):
    """Improved residual unit with excitation."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if in_channels == channels:
            self.shortcut_layer = _Subsample(stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            _Excitation(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return out


class IRSE50(nn.Module):
    """Face crops [B, 3, 112, 112] in [-1, 1] to unit embeddings [B, E].

    Args:
        embedding: Width E of the embedding.
        stages: Width and number of units of each stage; other than the default only in tests.
    """

    def __init__(self, embedding: int = 512, stages: tuple[tuple[int, int], ...] = _STAGES) -> None:
        super().__init__()
        first, last = stages[0][0], stages[-1][0]
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.PReLU(first)
        )
        units, channels = [], first
        for width, count in stages:
            for i in range(count):
                units.append(_Bottleneck(channels, width, 2 if i == 0 else 1))
                channels = width
        self.body = nn.Sequential(*units)
        side = 112 // 2 ** len(stages)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last),
            nn.Dropout(),
            nn.Flatten(),
            nn.Linear(last * side * side, embedding),
            nn.BatchNorm1d(embedding),
        )

    def forward(self, face: torch.Tensor) -> torch.Tensor:
        """Embed ArcFace-framed crops."""
        features = self.output_layer(self.body(self.input_layer(face)))
        return nn.functional.normalize(features, dim=1)
