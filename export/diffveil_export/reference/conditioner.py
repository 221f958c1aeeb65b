"""Image conditioning of the reference bundle: vision tower, MSI and expander.

The shape is Diff-Privacy's (He et al. 2023, "multi-scale image inversion"): five scales of a vision
tower, two diffusion stages a scale, give ten tokens; a text-encoder-like expander turns one token
into the sequence that the UNet attends to. Unlike the original the tower is small, convolutional
and trained with the UNet, and its pooling weighs positions, since the faces are aligned.
"""

from __future__ import annotations

import torch
from torch import nn

from diffveil_export.reference.layers import ResidualBlock

__all__ = ["STAGES", "Conditioner"]

STAGES = 10


class _Pool(nn.Module):
    """Features [B, C, S, S] → [B, C]: one learned spatial weighting a channel."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, size * size), 1.0 / size**2))
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.norm((x.flatten(2) * self.weight).sum(2))
        return pooled


class _Attention(nn.Module):
    """Multi-head attention of a query sequence to a context sequence, both [B, L, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, query: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        def split(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

        q, k, v = split(self.to_q(query)), split(self.to_k(context)), split(self.to_v(context))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class _Layer(nn.Module):
    """Pre-norm transformer layer, as in CLIP's text encoder but bidirectional."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h)
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class Conditioner(nn.Module):
    """Images to ten stage tokens, a token to a conditioning sequence.

    Args:
        image_size: Side S of the square input in pixels.
        width: Width D of tokens and conditioning.
        length: Length T of the conditioning sequence.
        tower: Channels at S/4, S/8, S/16 and S/32.
        heads: Attention heads.
    """

    def __init__(
        self,
        image_size: int = 128,
        width: int = 256,
        length: int = 8,
        tower: tuple[int, int, int, int] = (64, 128, 192, 192),
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.config = {
            "image_size": image_size,
            "width": width,
            "length": length,
            "tower": list(tower),
            "heads": heads,
        }
        sizes = [image_size // 4, image_size // 8, image_size // 16, image_size // 32]
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, tower[0], 3, padding=1))
        self.scales = nn.ModuleList(
            [
                ResidualBlock(tower[0]),
                nn.Sequential(nn.Conv2d(tower[0], tower[1], 3, 2, 1), ResidualBlock(tower[1])),
                nn.Sequential(nn.Conv2d(tower[1], tower[2], 3, 2, 1), ResidualBlock(tower[2])),
                nn.Sequential(nn.Conv2d(tower[2], tower[3], 3, 2, 1), ResidualBlock(tower[3])),
                ResidualBlock(tower[3]),
            ]
        )
        channels = [*tower, tower[3]]
        sizes.append(sizes[-1])
        self.pools = nn.ModuleList(_Pool(c, s) for c, s in zip(channels, sizes, strict=True))
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(c, width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False)
            )
            for c in channels
        )
        self.stage = nn.Parameter(torch.randn(STAGES, width))
        self.attention1 = _Attention(width, heads)
        self.attention2 = _Attention(width, heads)
        self.out = nn.Linear(width, width)

        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        # Stands at the placeholder's position when there is no image: the empty prompt.
        self.empty = nn.Parameter(0.02 * torch.randn(width))
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(2))
        self.final_norm = nn.LayerNorm(width)

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """Tokens [B, 10, D] of images [B, 3, S, S] in [-1, 1]."""
        x = self.stem(image)
        levels = []
        for scale, pool, projector in zip(self.scales, self.pools, self.projectors, strict=True):
            x = scale(x)
            levels.append(nn.functional.normalize(projector(pool(x)), dim=-1))
        # Stages 2k and 2k + 1 read scale k; √D brings the unit vectors back to unit variance.
        scale = self.stage * self.stage.shape[1] ** 0.5
        base = torch.stack(levels, 1).repeat_interleave(2, 1) * scale
        mixed = base + self.attention1(base, base)
        mixed = mixed + self.attention2(mixed, base)
        tokens: torch.Tensor = self.out(mixed)
        return tokens

    def expand(self, tokens: torch.Tensor) -> torch.Tensor:
        """Conditioning [N, T, D] of tokens [N, D]: the token takes the placeholder's position."""
        x = self.position.expand(tokens.shape[0], -1, -1)
        x = torch.cat([x[:, :1], x[:, 1:2] + tokens[:, None], x[:, 2:]], 1)
        for layer in self.layers:
            x = layer(x)
        conditioning: torch.Tensor = self.final_norm(x)
        return conditioning

    def unconditional(self) -> torch.Tensor:
        """Conditioning [1, T, D] of the empty prompt."""
        return self.expand(self.empty[None])
