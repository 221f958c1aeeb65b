"""A small decoder for `guide`: diffusers' `AutoencoderTiny` (TAESD) in place of the full one.

The gradient through it costs a fraction of the full decoder's. What it does to protection is a
matter of measurement: `guide` then steers what the small decoder shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.components import Autoencoder
from diffveil_export.sources.hub import Repository

__all__ = ["TinyDecoder", "load_tiny_decoder"]


class TinyDecoder(nn.Module):
    """Adapts the decoder of `diffusers.AutoencoderTiny` to this project's scaled latents."""

    def __init__(self, tiny: Any) -> None:
        super().__init__()
        self.decoder = tiny.decoder
        self.scale = float(tiny.config.scaling_factor)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, S, S] in about [-1, 1] of scaled latents [B, C, s, s]."""
        image: torch.Tensor = self.decoder(latent / self.scale)
        return image


def load_tiny_decoder(folder: Path, autoencoder: Autoencoder, latent: torch.Tensor) -> TinyDecoder:
    """Load a small decoder and hold it against the full one.

    Args:
        folder: diffusers folder of an `AutoencoderTiny`.
        autoencoder: The full one, whose latents it must decode to photos of the same size.
        latent: Any latent [1, C, s, s], to compare sizes.

    Raises:
        OptionError: The folder cannot be loaded, or its decoder does not fit.
    """
    import diffusers

    tiny_class: Any = diffusers.AutoencoderTiny
    tiny = Repository(str(folder), {"local_files_only": True}).load(
        tiny_class, "", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    decoder = TinyDecoder(tiny).eval().requires_grad_(False)
    channels = int(tiny.config.latent_channels)
    if channels != latent.shape[1]:
        raise OptionError(
            f"--guide-decoder: '{folder}' decodes {channels} latent channels, the model has "
            f"{latent.shape[1]}"
        )
    with torch.no_grad():
        received, expected = decoder.decode(latent).shape, autoencoder.decode(latent).shape
    if received != expected:
        raise OptionError(
            f"--guide-decoder: '{folder}' gives photos {list(received)}, the model's own decoder "
            f"{list(expected)}"
        )
    return decoder
