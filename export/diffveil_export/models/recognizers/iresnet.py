"""ArcFace's improved residual networks, IResNet-18 … -200.

Deng et al., "ArcFace", arXiv 1801.07698; the unit is that of Duta et al., "Improved Residual
Networks", arXiv 2004.04989. Parameters are named as in the usual weight files (`conv1`,
`layer1.0.bn1`, `layer1.0.downsample.0`, `fc`, `features`, …).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

__all__ = ["DEPTHS", "IResNet"]

DEPTHS: Mapping[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}
"""Units of each stage by the number that names the network."""

_WIDTHS = (64, 64, 128, 256, 512)


class _Unit(nn.Module):
    """Normalise, convolve, normalise, activate, convolve with stride, normalise; add."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        hidden = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        out: torch.Tensor = self.bn3(self.conv2(hidden)) + shortcut
        return out


class IResNet(nn.Module):
    """Face crops [B, 3, 112, 112] in [-1, 1] to unit embeddings [B, E].

    Args:
        units: Units of each of the four stages, see `DEPTHS`.
        embedding: Width E of the embedding.
        widths: Channels of the stem and of each stage; other than the default only in tests.
    """

    def __init__(
        self,
        units: tuple[int, ...] = DEPTHS[50],
        embedding: int = 512,
        widths: tuple[int, ...] = _WIDTHS,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        for stage, count in enumerate(units):
            before, width = widths[stage], widths[stage + 1]
            blocks = [_Unit(before, width, 2), *(_Unit(width, width, 1) for _ in range(count - 1))]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(units)
        self.bn2 = nn.BatchNorm2d(widths[-1])
        side = 112 // 2 ** len(units)
        self.fc = nn.Linear(widths[-1] * side * side, embedding)
        self.features = nn.BatchNorm1d(embedding)

    def forward(self, face: torch.Tensor) -> torch.Tensor:
        """Embed ArcFace-framed crops."""
        x = self.prelu(self.bn1(self.conv1(face)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        features = self.features(self.fc(self.bn2(x).flatten(1)))
        return nn.functional.normalize(features, dim=1)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> IResNet:
        """The network whose tensors have these shapes, with weights of its own.

        Raises:
            KeyError: A tensor that decides about the shape of the network is missing.
        """
        units: list[int] = []
        while f"layer{len(units) + 1}.0.conv1.weight" in shapes:
            stage, count = len(units) + 1, 0
            while f"layer{stage}.{count}.conv1.weight" in shapes:
                count += 1
            units.append(count)
        widths = [shapes["conv1.weight"][0]]
        widths += [shapes[f"layer{i + 1}.0.conv1.weight"][0] for i in range(len(units))]
        return cls(tuple(units), shapes["fc.weight"][0], tuple(widths))
