"""The face recognizer of the reference bundle, distilled from a larger teacher."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["FaceRecognizer"]


class _Block(nn.Module):
    """Residual block whose batch normalisations fold into its convolutions for export."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1: nn.Module = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2: nn.Module = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.silu(self.norm1(self.conv1(x)))
        return nn.functional.silu(x + self.norm2(self.conv2(h)))


class _Stem(nn.Module):
    """3×3 convolution, batch normalisation, SiLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1: nn.Module = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.norm1(self.conv1(x)))


class FaceRecognizer(nn.Module):
    """Aligned face crops to unit embeddings.

    Smooth activations everywhere: the gradient of this network steers the diffusion.

    Args:
        margin: Pixels cut from each side of the crop; what remains is ArcFace's 112×112 framing.
        size: Side of the framing in pixels.
        widths: Channels at size/4, size/8 and size/16.
        blocks: Residual blocks at the same resolutions.
        embedding: Width E of the embedding.
    """

    def __init__(
        self,
        margin: int = 8,
        size: int = 112,
        widths: tuple[int, int, int] = (96, 192, 256),
        blocks: tuple[int, int, int] = (2, 3, 2),
        embedding: int = 256,
    ) -> None:
        super().__init__()
        self.margin, self.size = margin, size
        self.config = {
            "margin": margin,
            "size": size,
            "widths": list(widths),
            "blocks": list(blocks),
            "embedding": embedding,
        }
        layers: list[nn.Module] = [nn.PixelUnshuffle(4)]
        previous = 48
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers.append(_Stem(previous, width, 1 if i == 0 else 2))
            layers.extend(_Block(width) for _ in range(count))
            previous = width
        self.features = nn.Sequential(*layers)
        side = size // 16
        self.pool = nn.Parameter(torch.full((previous, side * side), 1.0 / side**2))
        self.head = nn.Linear(previous, embedding)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, E], L2-normalised, of crops [B, 3, S, S] in [-1, 1]."""
        start, stop = self.margin, self.margin + self.size
        x = self.features(image[:, :, start:stop, start:stop])
        return nn.functional.normalize(self.head((x.flatten(2) * self.pool).sum(2)), dim=-1)

    def fuse(self) -> FaceRecognizer:
        """Fold every batch normalisation into its convolution, in place; for inference only."""
        self.eval()
        for module in self.modules():
            if isinstance(module, (_Block, _Stem)):
                for i in "12":
                    norm = getattr(module, f"norm{i}", None)
                    if isinstance(norm, nn.BatchNorm2d):
                        conv = getattr(module, f"conv{i}")
                        setattr(module, f"conv{i}", fuse_conv_bn_eval(conv, norm))
                        setattr(module, f"norm{i}", nn.Identity())
        return self
