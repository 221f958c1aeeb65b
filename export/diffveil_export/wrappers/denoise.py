"""Program `denoise`."""

from __future__ import annotations

import torch
from torch import nn

from diffveil_export.components import Denoiser

__all__ = ["Denoise"]


class Denoise(nn.Module):
    """latent [B, C, s, s], timestep [B], conditioning [B, T, W] → epsilon [B, C, s, s]."""

    def __init__(self, unet: Denoiser) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latent: torch.Tensor, timestep: torch.Tensor, conditioning: torch.Tensor
    ) -> torch.Tensor:
        """Predict the noise."""
        return self.unet(latent, timestep, conditioning)
