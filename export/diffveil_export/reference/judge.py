"""The reference bundle's judge of drawn faces: what eyes would say, learned from grades."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from diffveil_export.reference.recognizer import FaceRecognizer

__all__ = ["FaceJudge", "GradeHeads"]

_SIDE = 7  # to which every feature map is brought
_PLACES = 4  # weighted sums over the face


class _Head(nn.Module):
    def __init__(self, widths: Sequence[int], width: int, drop: float) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.drop = nn.Dropout2d(drop)
        self.mix = nn.Conv2d(width * len(widths), 2 * width, 3, padding=1)
        places = 1 + 0.5 * torch.randn(_PLACES, _SIDE**2)
        self.places = nn.Parameter(places / _SIDE**2)
        self.forget = nn.Dropout(drop)
        self.grade = nn.Linear(2 * width * _PLACES, 1)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        pairs = zip(self.reduce, features, strict=True)
        x = torch.cat([_brought(F.silu(reduce(f))) for reduce, f in pairs], 1)
        x = F.silu(self.mix(self.drop(x))).flatten(2)
        sums = torch.einsum("bcp,kp->bkc", x, self.places).flatten(1)
        grade: torch.Tensor = self.grade(self.forget(sums)).squeeze(1)
        return grade


def _brought(x: torch.Tensor) -> torch.Tensor:
    """To 7×7: means of neighbours, or in between them."""
    if x.shape[-1] > _SIDE and x.shape[-1] % _SIDE == 0:
        return F.avg_pool2d(x, x.shape[-1] // _SIDE)
    return F.interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)


class GradeHeads(nn.Module):
    """How natural faces look, by a network's features of them: several heads, one opinion.

    Args:
        widths: Channels of the feature maps.
        heads: How many, each with its own idea of what matters.
        width: Channels to which a head reduces each map.
        drop: Share of channels that a head does without while it learns.
    """

    def __init__(
        self, widths: Sequence[int], heads: int = 4, width: int = 24, drop: float = 0.3
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head(widths, width, drop) for _ in range(heads))
        for i, channels in enumerate(widths):
            self.register_buffer(f"mean{i}", torch.zeros(channels))
            self.register_buffer(f"scale{i}", torch.ones(channels))
        self._fused = False

    def measure(self, features: Sequence[torch.Tensor]) -> None:
        """Let the heads know what features [B, C, s, s] of faces are like."""
        for i, maps in enumerate(features):
            self.get_buffer(f"mean{i}").copy_(maps.mean((0, 2, 3)))
            self.get_buffer(f"scale{i}").copy_(1 / maps.std((0, 2, 3)).clamp(min=1e-3))

    def opinions(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Log-odds of naturalness [heads, B] of faces with features [B, C, s, s]."""
        if not self._fused:
            features = [self._alike(i, maps) for i, maps in enumerate(features)]
        return torch.stack([head(features) for head in self.heads])

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Log-odds of naturalness [B], the mean of all heads'."""
        return self.opinions(features).mean(0)

    @torch.no_grad()
    def fuse(self) -> GradeHeads:
        """Let the heads take features as they come, in place; for inference only."""
        for head in self.heads:
            for i, layer in enumerate(cast(_Head, head).reduce):
                conv = cast(nn.Conv2d, layer)
                assert conv.bias is not None
                conv.weight.mul_(self.get_buffer(f"scale{i}")[:, None, None])
                conv.bias.sub_(conv.weight[:, :, 0, 0] @ self.get_buffer(f"mean{i}"))
        for name, buffer in self.named_buffers():
            buffer.fill_(float(name.startswith("scale")))
        self._fused = True
        return self.eval()

    def _alike(self, i: int, maps: torch.Tensor) -> torch.Tensor:
        mean, scale = (self.get_buffer(f"{name}{i}")[:, None, None] for name in ("mean", "scale"))
        return (maps.float() - mean) * scale


class FaceJudge(nn.Module):
    """Aligned face crops to how natural the faces in them look.

    It sees with a recognizer's eyes, which already know eyes, noses and mouths. As long as they are
    as they were, a bundle that has the recognizer stores little more for it.

    Args:
        recognizer: Fused; the judge takes over its layers.
    """

    def __init__(self, recognizer: FaceRecognizer) -> None:
        super().__init__()
        self.margin, self.size = recognizer.margin, recognizer.size
        self.trunk = recognizer.features.requires_grad_(False)
        widths, blocks = (cast(list[int], recognizer.config[k]) for k in ("widths", "blocks"))
        last = len(self.trunk) - 1
        self._seen = (last - blocks[-1] - 1, last)  # what size/8 and size/16 end in
        self.heads = GradeHeads(widths[1:])

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """What the heads look at, each [B, C, s, s], of crops [B, 3, S, S] in [-1, 1]."""
        start, stop = self.margin, self.margin + self.size
        x, seen = image[:, :, start:stop, start:stop], []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in self._seen:
                seen.append(x)
        return seen

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Naturalness [B], 0 … 1, of crops [B, 3, S, S] in [-1, 1]."""
        return self.heads(self.features(image)).sigmoid()  # type: ignore[no-any-return]

    def fuse(self) -> FaceJudge:
        """Fuse its heads, in place; for inference only."""
        self.heads.fuse()
        return self.eval()
