"""The UNet of diffusers as this project calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["DiffusersUNet"]


class DiffusersUNet(nn.Module):
    """Adapts `diffusers.UNet2DConditionModel` to positional tensors in and one tensor out."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latent: torch.Tensor, timestep: torch.Tensor, conditioning: torch.Tensor
    ) -> torch.Tensor:
        """Noise in latents [B, C, s, s] at timesteps [B], given conditioning [B, T, W]."""
        epsilon: torch.Tensor = self.unet(latent, timestep, conditioning, return_dict=False)[0]
        return epsilon
