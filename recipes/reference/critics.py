"""Who judges drawn faces: critics on pixels and on a recognizer's features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from distill import unit
from torch import nn
from torch.nn import functional as F
from train_decoder import Critic as PixelCritic

from diffveil_export.reference.recognizer import FaceRecognizer

FEATURES = {3: 96, 7: 192, 10: 256}  # layers of the recognizer that the critic reads: channels


class Standard(nn.Module):
    """Features [B, width, h, w] less their mean, over their deviation, channel by channel.

    Networks' features are mostly what all faces have in common: a critic that may not amplify
    sees no difference in them.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, width, 1, 1))
        self.register_buffer("deviation", torch.ones(1, width, 1, 1))

    def measure(self, features: torch.Tensor) -> None:
        """Take mean and deviation of real faces' features."""
        self.mean = features.mean((0, 2, 3), keepdim=True)
        self.deviation = features.std((0, 2, 3), keepdim=True).clamp(min=1e-3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return ((features - self.mean) / self.deviation).clamp(-6, 6)


def score_head(width: int) -> nn.Sequential:
    """Score maps [B, 1, h, w] of features [B, width, h, w]."""
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        Standard(width),
        norm(nn.Conv2d(width, 64, 3, padding=1)),
        nn.LeakyReLU(0.2),
        norm(nn.Conv2d(64, 64, 3, padding=1)),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 3, padding=1),
    )


def measure(heads: nn.ModuleList, features: list[torch.Tensor]) -> None:
    """Let heads know the features of real faces."""
    for head, maps in zip(heads, features, strict=True):
        standard = head[0]  # type: ignore[index]
        standard.measure(maps)


class FaceCritic(nn.Module):
    """Scores faces [B, 3, 128, 128] by their pixels and by features that frozen recognizers see.

    Args:
        others: Channels of feature maps that come after those of `look`.
    """

    def __init__(self, others: Sequence[int] = ()) -> None:
        super().__init__()
        self.pixels = PixelCritic()
        widths = [*FEATURES.values(), *others]
        self.heads = nn.ModuleList(score_head(width) for width in widths)

    def forward(self, image: torch.Tensor, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Score maps, each [B, 1, h, w]."""
        scores, _ = self.pixels(image)
        return [*scores, *(head(f) for head, f in zip(self.heads, features, strict=True))]


def regard(template: np.ndarray, size: int) -> torch.Tensor:
    """Weight of each place of an aligned face: 4 at eyes, nose and mouth, 1 far from them.

    Args:
        template: Eyes, tip of the nose and corners of the mouth, [5, 2] (x, y), in pixels.
        size: Side of the face in pixels.

    Returns:
        float32 [1, 1, size, size].
    """
    spots = np.concatenate([template, template[3:].mean(0, keepdims=True)])
    width = 0.3 * np.hypot(*(template[1] - template[0]))
    y, x = np.mgrid[:size, :size]
    distance = np.stack([np.hypot(x - spot[0], y - spot[1]) for spot in spots]).min(0)
    weight = 1 + 3 * np.exp(-((distance / width) ** 2))
    return torch.from_numpy(weight).float()[None, None]


def look(
    recognizer: FaceRecognizer, image: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features for the critic, of about unit variance, and embeddings [B, E] of [B, 3, S, S]."""
    start, stop = recognizer.margin, recognizer.margin + recognizer.size
    x, features = image[:, :, start:stop, start:stop], []
    for i, layer in enumerate(recognizer.features):
        x = layer(x)
        if i in FEATURES:
            features.append(unit(x.float()))
    pooled = (x.flatten(2) * recognizer.pool).sum(2)
    return features, F.normalize(recognizer.head(pooled).float(), dim=-1)


def within(score: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of a score map [B, 1, h, w] where masks [B, 1, S, S] show the drawn faces."""
    weight = F.adaptive_avg_pool2d(mask, (score.shape[-2], score.shape[-1]))
    return (score.float() * weight).mean() / weight.mean()


def hinge(
    real: list[torch.Tensor], drawn: list[torch.Tensor], masks: list[torch.Tensor]
) -> torch.Tensor:
    """What critics minimise: the hinge loss of their score maps, where masks show the face."""
    return torch.stack(
        [
            within(F.relu(1 - r.float()), m) + within(F.relu(1 + d.float()), m)
            for r, d, m in zip(real, drawn, masks, strict=True)
        ]
    ).sum()


def merit(scores: list[torch.Tensor], masks: list[torch.Tensor]) -> torch.Tensor:
    """What drawn faces maximise: their mean scores, where masks show the face."""
    return torch.stack([within(s, m) for s, m in zip(scores, masks, strict=True)]).sum()
