"""The autoencoder of the reference bundle: 128×128 faces to 8×16×16 latents and back.

Beside it `FaceDecoder`, a narrow stand-in for its decoder that `guide` may go through.
"""

from __future__ import annotations

import torch
from torch import nn

from diffveil_export.reference.layers import ResidualBlock, Upsample

__all__ = ["FaceAutoencoder", "FaceDecoder"]


def _decoder(
    latent_channels: int, widths: tuple[int, int, int], blocks: tuple[int, int, int]
) -> nn.Sequential:
    """Latents [B, C, s, s] to images [B, 3, 8s, 8s]; no layer works at full resolution."""
    fine, middle, coarse = widths
    return nn.Sequential(
        nn.Conv2d(latent_channels, coarse, 3, padding=1),
        *(ResidualBlock(coarse) for _ in range(blocks[0])),
        Upsample(coarse, middle),
        *(ResidualBlock(middle) for _ in range(blocks[1])),
        Upsample(middle, fine),
        *(ResidualBlock(fine) for _ in range(blocks[2])),
        nn.GroupNorm(fine // 16, fine),
        nn.SiLU(),
        nn.Conv2d(fine, 12, 3, padding=1),
        nn.PixelShuffle(2),
    )


class FaceAutoencoder(nn.Module):
    """Convolutional variational autoencoder with a downsampling factor of eight.

    The first layer is a pixel unshuffle by four, so no layer ever works at full resolution: on a
    CPU that, not the parameter count, decides the cost.

    Args:
        latent_channels: Channels of the latent.
        widths: Channels at 64², 32² and 16² pixels for a 128² image.
        encoder_blocks: Residual blocks at 32² and 16².
        decoder_blocks: Residual blocks at 16², 32² and 64².
    """

    def __init__(
        self,
        latent_channels: int = 8,
        widths: tuple[int, int, int] = (48, 96, 192),
        encoder_blocks: tuple[int, int] = (2, 2),
        decoder_blocks: tuple[int, int, int] = (4, 3, 1),
    ) -> None:
        super().__init__()
        _, middle, coarse = widths
        self.config = {
            "latent_channels": latent_channels,
            "widths": list(widths),
            "encoder_blocks": list(encoder_blocks),
            "decoder_blocks": list(decoder_blocks),
        }
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, middle, 3, padding=1),
            *(ResidualBlock(middle) for _ in range(encoder_blocks[0])),
            nn.Conv2d(middle, coarse, 3, stride=2, padding=1),
            *(ResidualBlock(coarse) for _ in range(encoder_blocks[1])),
            nn.GroupNorm(coarse // 16, coarse),
            nn.SiLU(),
            nn.Conv2d(coarse, 2 * latent_channels, 3, padding=1),
        )
        self.decoder = _decoder(latent_channels, widths, decoder_blocks)
        # Standard deviation of each latent channel over the training set (set by the recipe):
        # programs exchange latents of unit variance, as the noise schedule assumes.
        self.latent_std: torch.Tensor
        self.latent_mean: torch.Tensor
        self.register_buffer("latent_std", torch.ones(1, latent_channels, 1, 1))
        self.register_buffer("latent_mean", torch.zeros(1, latent_channels, 1, 1))

    def posterior(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance [B, C, H/8, W/8] of the unscaled latent of `image` [B, 3, H, W]."""
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar.clamp(-12.0, 4.0)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Scaled latent mean [B, C, H/8, W/8] of images [B, 3, H, W] in [-1, 1]."""
        return (self.posterior(image)[0] - self.latent_mean) / self.latent_std

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], about [-1, 1], of scaled latents [B, C, H/8, W/8]."""
        image: torch.Tensor = self.decoder(latent * self.latent_std + self.latent_mean)
        return image


class FaceDecoder(nn.Module):
    """A decoder of `FaceAutoencoder`'s kind that takes scaled latents as they are.

    Narrow, it stands in for the real one where only the recognizer looks: in `guide`.

    Args:
        latent_channels: Channels of the latent.
        widths: Channels at 64², 32² and 16² pixels for a 128² image; multiples of 16.
        blocks: Residual blocks at 16², 32² and 64².
    """

    def __init__(
        self,
        latent_channels: int = 8,
        widths: tuple[int, int, int] = (16, 32, 64),
        blocks: tuple[int, int, int] = (2, 1, 1),
    ) -> None:
        super().__init__()
        self.config = {
            "latent_channels": latent_channels,
            "widths": list(widths),
            "blocks": list(blocks),
        }
        self.decoder = _decoder(latent_channels, widths, blocks)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], about [-1, 1], of scaled latents [B, C, H/8, W/8]."""
        image: torch.Tensor = self.decoder(latent)
        return image
