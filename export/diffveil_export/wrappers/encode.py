"""Program `encode`."""

from __future__ import annotations

import torch
from torch import nn

from diffveil_export.components import Autoencoder

__all__ = ["Encode"]


class Encode(nn.Module):
    """image [B, 3, S, S] → latent [B, C, s, s]: the posterior's mean, scaled."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Run the encoder."""
        return self.autoencoder.encode(image)
