"""Program `decode`."""

from __future__ import annotations

import torch
from torch import nn

from diffveil_export.components import Autoencoder

__all__ = ["Decode"]


class Decode(nn.Module):
    """latent [B, C, s, s] → image [B, 3, S, S], not clipped."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Run the decoder."""
        return self.autoencoder.decode(latent)
