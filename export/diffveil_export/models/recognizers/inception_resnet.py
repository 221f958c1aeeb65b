"""InceptionResnetV1, the usual PyTorch form of FaceNet.

Schroff et al., "FaceNet", arXiv 1503.03832, and Szegedy et al., "Inception-v4, Inception-ResNet
and the Impact of Residual Connections on Learning", arXiv 1602.07261. Parameters are named as in
the usual weight files (`conv2d_1a.conv`, `repeat_1.0.branch0.conv`, `last_linear`, `last_bn`, …);
the classifier `logits`, which those files also hold, is not part of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

__all__ = ["InceptionResnetV1"]


class _Conv(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(
        self,
        width: int,
        out: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        pad: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.bn(self.conv(x)).relu()
        return out


class _Residual(nn.Module):
    """Branches, joined and projected by `conv2d`, scaled and added to the input."""

    def __init__(
        self, branches: list[nn.Module], joined: int, width: int, scale: float, relu: bool = True
    ) -> None:
        super().__init__()
        for i, branch in enumerate(branches):
            setattr(self, f"branch{i}", branch)
        self.count, self.scale, self.relu = len(branches), scale, relu
        self.conv2d = nn.Conv2d(joined, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([getattr(self, f"branch{i}")(x) for i in range(self.count)], 1)
        out: torch.Tensor = x + self.conv2d(joined) * self.scale
        return out.relu() if self.relu else out


class _Reduction(nn.Module):
    """Branches that halve the resolution, the last of which has no parameters."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        branches = [*branches, nn.MaxPool2d(3, 2)]
        for i, branch in enumerate(branches):
            setattr(self, f"branch{i}", branch)
        self.count = len(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([getattr(self, f"branch{i}")(x) for i in range(self.count)], 1)


class InceptionResnetV1(nn.Module):
    """Face crops [B, 3, 160, 160] in [-1, 1] to unit embeddings [B, E].

    Published weights expect (pixel - 127.5) / 128 of crops framed more widely than ArcFace's.

    Args:
        embedding: Width E of the embedding.
        repeats: Residual units at each of the three resolutions.
        divisor: Divides all widths; other than 1 only in tests.
    """

    def __init__(
        self,
        embedding: int = 512,
        repeats: tuple[int, int, int] = (5, 10, 5),
        divisor: int = 1,
    ) -> None:
        super().__init__()
        w32, w64, w80, w128, w192, w256, w384 = (
            n // divisor for n in (32, 64, 80, 128, 192, 256, 384)
        )
        w896, w1792 = w384 + 2 * w256, w384 + 2 * w256 + w384 + 2 * w256

        def unit35() -> nn.Module:
            branch1 = nn.Sequential(_Conv(w256, w32), _Conv(w32, w32, 3, 1, 1))
            branch2 = nn.Sequential(
                _Conv(w256, w32), _Conv(w32, w32, 3, 1, 1), _Conv(w32, w32, 3, 1, 1)
            )
            return _Residual([_Conv(w256, w32), branch1, branch2], 3 * w32, w256, 0.17)

        def unit17() -> nn.Module:
            branch1 = nn.Sequential(
                _Conv(w896, w128),
                _Conv(w128, w128, (1, 7), 1, (0, 3)),
                _Conv(w128, w128, (7, 1), 1, (3, 0)),
            )
            return _Residual([_Conv(w896, w128), branch1], 2 * w128, w896, 0.10)

        def unit8(scale: float, relu: bool) -> nn.Module:
            branch1 = nn.Sequential(
                _Conv(w1792, w192),
                _Conv(w192, w192, (1, 3), 1, (0, 1)),
                _Conv(w192, w192, (3, 1), 1, (1, 0)),
            )
            return _Residual([_Conv(w1792, w192), branch1], 2 * w192, w1792, scale, relu)

        self.conv2d_1a = _Conv(3, w32, 3, 2)
        self.conv2d_2a = _Conv(w32, w32, 3)
        self.conv2d_2b = _Conv(w32, w64, 3, 1, 1)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = _Conv(w64, w80)
        self.conv2d_4a = _Conv(w80, w192, 3)
        self.conv2d_4b = _Conv(w192, w256, 3, 2)
        self.repeat_1 = nn.Sequential(*(unit35() for _ in range(repeats[0])))
        self.mixed_6a = _Reduction(
            [
                _Conv(w256, w384, 3, 2),
                nn.Sequential(
                    _Conv(w256, w192), _Conv(w192, w192, 3, 1, 1), _Conv(w192, w256, 3, 2)
                ),
            ]
        )
        self.repeat_2 = nn.Sequential(*(unit17() for _ in range(repeats[1])))
        self.mixed_7a = _Reduction(
            [
                nn.Sequential(_Conv(w896, w256), _Conv(w256, w384, 3, 2)),
                nn.Sequential(_Conv(w896, w256), _Conv(w256, w256, 3, 2)),
                nn.Sequential(
                    _Conv(w896, w256), _Conv(w256, w256, 3, 1, 1), _Conv(w256, w256, 3, 2)
                ),
            ]
        )
        self.repeat_3 = nn.Sequential(*(unit8(0.20, True) for _ in range(repeats[2])))
        self.block8 = unit8(1.0, False)
        self.last_linear = nn.Linear(w1792, embedding, bias=False)
        self.last_bn = nn.BatchNorm1d(embedding, eps=0.001)

    def forward(self, face: torch.Tensor) -> torch.Tensor:
        """Embed face crops."""
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(face)))
        x = self.conv2d_4b(self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x))))
        x = self.repeat_2(self.mixed_6a(self.repeat_1(x)))
        x = self.block8(self.repeat_3(self.mixed_7a(x)))
        features = self.last_bn(self.last_linear(x.mean((2, 3))))
        return nn.functional.normalize(features, dim=1)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> InceptionResnetV1:
        """The network whose tensors have these shapes, with weights of its own.

        Raises:
            KeyError: A tensor that decides about the shape of the network is missing.
        """
        repeats = []
        for name in ("repeat_1", "repeat_2", "repeat_3"):
            count = 0
            while f"{name}.{count}.conv2d.weight" in shapes:
                count += 1
            repeats.append(count)
        divisor = max(1, 32 // shapes["conv2d_1a.conv.weight"][0])
        return cls(shapes["last_linear.weight"][0], (repeats[0], repeats[1], repeats[2]), divisor)
