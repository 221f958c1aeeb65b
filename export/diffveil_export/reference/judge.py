"""The reference bundle's judge of drawn faces: what eyes would say, learned from grades."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffveil_export.reference.recognizer import FaceRecognizer

__all__ = ["FaceJudge"]

_PLACES = 4  # weighted means over the face, beside its most conspicuous spot


class _Conv(nn.Module):
    """Convolution, batch normalisation, SiLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.norm(self.conv(x)))

    def fuse(self) -> None:
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class FaceJudge(nn.Module):
    """Aligned face crops to how natural the faces in them look.

    The trunk is the lower part of a `FaceRecognizer`, whose weights it begins with: such features
    already know eyes, noses and mouths.

    Args:
        margin: Pixels cut from each side of the crop; what remains is ArcFace's 112×112 framing.
        size: Side of the framing in pixels.
        widths: Channels at size/4 and size/8.
        blocks: Residual blocks at the same resolutions.
        width: Channels after the trunk.
    """

    def __init__(
        self,
        margin: int = 8,
        size: int = 112,
        widths: tuple[int, int] = (96, 192),
        blocks: tuple[int, int] = (2, 2),
        width: int = 96,
    ) -> None:
        super().__init__()
        self.margin, self.size = margin, size
        lower = FaceRecognizer(margin, size, (*widths, 8), (*blocks, 0), 8)
        self.trunk = lower.features[: 3 + sum(blocks)]
        self.body = nn.Sequential(
            nn.Dropout2d(0.1),
            _Conv(widths[1], width, 1),
            _Conv(width, width, 3, 2),
            _Conv(width, width, 3),
        )
        side = size // 16
        self.places = nn.Parameter(torch.zeros(_PLACES, side * side))
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear((_PLACES + 1) * width, 1)

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        """Log-odds [B] of naturalness, for training; arguments are those of `forward`."""
        start, stop = self.margin, self.margin + self.size
        x = self.body(self.trunk(image[:, :, start:stop, start:stop])).flatten(2)
        means = torch.einsum("bcp,kp->bkc", x, self.places.softmax(1)).flatten(1)
        pooled = torch.cat([means, x.amax(2)], 1)
        logits: torch.Tensor = self.head(self.drop(pooled)).squeeze(1)
        return logits

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Naturalness [B], 0 … 1, of crops [B, 3, S, S] in [-1, 1]."""
        return self.logits(image).sigmoid()

    def begin_with(self, recognizer: FaceRecognizer) -> None:
        """Take over the weights of a fused recognizer's lower layers; the trunk is fused then."""
        for mine, theirs in zip(
            self.trunk.children(), recognizer.features.children(), strict=False
        ):
            for name, module in theirs.named_children():
                setattr(mine, name, module)

    def fuse(self) -> FaceJudge:
        """Fold every batch normalisation into its convolution, in place; for inference only."""
        self.eval()
        for module in self.modules():
            if isinstance(module, _Conv):
                module.fuse()
        return self
