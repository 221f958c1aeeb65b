"""Building blocks shared by the networks of the reference bundle."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ResidualBlock", "Upsample"]


class ResidualBlock(nn.Module):
    """Pre-activation residual block: GroupNorm → SiLU → 3×3 convolution, twice.

    Args:
        channels: Width of input and output, a multiple of 16.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = channels // 16
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        # A residual branch that starts at zero keeps early training stable.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features [B, C, H, W] to features of the same shape."""
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        out: torch.Tensor = x + h
        return out


class Upsample(nn.Module):
    """Double the resolution: a 3×3 convolution to four times the width, then pixel shuffle."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)
        # All four sub-pixels start equal (nearest upsampling), which avoids checkerboards.
        with torch.no_grad():
            weight = self.conv.weight
            weight.copy_(weight[::4].repeat_interleave(4, 0))
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features [B, C, H, W] to [B, C', 2H, 2W]."""
        return nn.functional.pixel_shuffle(self.conv(x), 2)
