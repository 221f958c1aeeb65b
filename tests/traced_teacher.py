"""A small recognizer as they come in TorchScript: traced, frozen, mirroring its input."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["saved_teacher"]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu6(self.conv(x))


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 7, 8, 3), _Block(6), _Block(6), nn.Conv2d(6, 10, 2, 2), _Block(10)
        )
        self.head = nn.Linear(10 * 49, 16)

    def _look(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.layers(x / 127.5 - 1).flatten(1))
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self._look(x) + self._look(x.flip(3)))


def saved_teacher(file: Path, seed: int = 0) -> Path:
    """Write one with random weights; features [B, 6, 14, 14] and [B, 10, 7, 7]."""
    torch.manual_seed(seed)
    traced = torch.jit.trace(_Network().eval(), torch.zeros(1, 3, 112, 112))  # type: ignore[no-untyped-call]
    torch.jit.save(torch.jit.freeze(traced), file)  # type: ignore[no-untyped-call]
    return file
