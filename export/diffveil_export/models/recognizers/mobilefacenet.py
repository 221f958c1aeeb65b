"""MobileFaceNet, a recognizer of about a million parameters.

Chen et al., "MobileFaceNets", arXiv 1804.07573. Parameters are named as in the usual PyTorch
weight files (`conv1.conv`, `conv_23.conv_dw.bn`, `conv_3.model.0.project.conv`, `linear`, …).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

__all__ = ["MobileFaceNet"]

_WIDTHS = (64, 64, 128, 128, 512)
_EXPANSIONS = (128, 128, 256, 256, 512, 256)
_UNITS = (4, 6, 2)


class _Linear(nn.Module):
    """Convolution and normalisation."""

    def __init__(
        self, width: int, out: int, kernel: int = 1, stride: int = 1, pad: int = 0, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, pad, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.bn(self.conv(x))
        return out


class _Active(_Linear):
    """Convolution, normalisation, PReLU."""

    def __init__(
        self, width: int, out: int, kernel: int = 1, stride: int = 1, pad: int = 0, groups: int = 1
    ) -> None:
        super().__init__(width, out, kernel, stride, pad, groups)
        self.prelu = nn.PReLU(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.prelu(super().forward(x))
        return out


class _Bottleneck(nn.Module):
    """Inverted residual: widen, filter each channel, project."""

    def __init__(self, width: int, hidden: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = _Active(width, hidden)
        self.conv_dw = _Active(hidden, hidden, 3, stride, 1, groups=hidden)
        self.project = _Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.project(self.conv_dw(self.conv(x)))
        return out


class _Residual(nn.Module):
    """Bottlenecks that each add to their input."""

    def __init__(self, width: int, hidden: int, count: int) -> None:
        super().__init__()
        self.model = nn.Sequential(*(_Bottleneck(width, hidden, width, 1) for _ in range(count)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for unit in self.model:
            x = x + unit(x)
        return x


class MobileFaceNet(nn.Module):
    """Face crops [B, 3, 112, 112] in [-1, 1] to unit embeddings [B, E].

    Args:
        embedding: Width E of the embedding.
        widths: Channels of the stem, of the three resolutions after it and of the last features.
        expansions: Widened channels of `conv_23`, `conv_3`, `conv_34`, `conv_4`, `conv_45` and
            `conv_5`.
        units: Bottlenecks of `conv_3`, `conv_4` and `conv_5`.
    """

    def __init__(
        self,
        embedding: int = 512,
        widths: tuple[int, ...] = _WIDTHS,
        expansions: tuple[int, ...] = _EXPANSIONS,
        units: tuple[int, ...] = _UNITS,
    ) -> None:
        super().__init__()
        stem, first, second, third, last = widths
        self.conv1 = _Active(3, stem, 3, 2, 1)
        self.conv2_dw = _Active(stem, stem, 3, 1, 1, groups=stem)
        self.conv_23 = _Bottleneck(stem, expansions[0], first, 2)
        self.conv_3 = _Residual(first, expansions[1], units[0])
        self.conv_34 = _Bottleneck(first, expansions[2], second, 2)
        self.conv_4 = _Residual(second, expansions[3], units[1])
        self.conv_45 = _Bottleneck(second, expansions[4], third, 2)
        self.conv_5 = _Residual(third, expansions[5], units[2])
        self.conv_6_sep = _Active(third, last)
        self.conv_6_dw = _Linear(last, last, 7, groups=last)
        self.linear = nn.Linear(last, embedding, bias=False)
        self.bn = nn.BatchNorm1d(embedding)

    def forward(self, face: torch.Tensor) -> torch.Tensor:
        """Embed ArcFace-framed crops."""
        x = self.conv2_dw(self.conv1(face))
        x = self.conv_3(self.conv_23(x))
        x = self.conv_4(self.conv_34(x))
        x = self.conv_5(self.conv_45(x))
        x = self.conv_6_dw(self.conv_6_sep(x)).flatten(1)
        return nn.functional.normalize(self.bn(self.linear(x)), dim=1)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> MobileFaceNet:
        """The network whose tensors have these shapes, with weights of its own.

        Raises:
            KeyError: A tensor that decides about the shape of the network is missing.
        """

        def channels(name: str) -> int:
            return shapes[f"{name}.conv.weight"][0]

        units = []
        for name in ("conv_3", "conv_4", "conv_5"):
            count = 0
            while f"{name}.model.{count}.conv.conv.weight" in shapes:
                count += 1
            units.append(count)
        downs = ("conv_23", "conv_34", "conv_45")
        widths = (channels("conv1"), *(channels(f"{d}.project") for d in downs))
        expansions = []
        for down, residual in zip(downs, ("conv_3", "conv_4", "conv_5"), strict=True):
            expansions += [channels(f"{down}.conv"), channels(f"{residual}.model.0.conv")]
        return cls(
            shapes["linear.weight"][0],
            (*widths, channels("conv_6_sep")),
            tuple(expansions),
            tuple(units),
        )
