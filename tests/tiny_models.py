"""Tiny random models of the reference family, for tests: 32-pixel crops, 8×4×4 latents."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from diffveil_export.components import Components
from diffveil_export.models.low_rank import add_low_rank, low_rank_state
from diffveil_export.models.reference import apply_few, assemble
from diffveil_export.reference.autoencoder import FaceAutoencoder
from diffveil_export.reference.conditioner import Conditioner
from diffveil_export.reference.recognizer import FaceRecognizer

__all__ = ["few_state", "randomize", "tiny_components", "tiny_few_components", "tiny_networks"]


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight and statistic from the generator, so that no branch stays silent."""
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("running_var", "latent_std")):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim > 1:
                fan_in = max(1, tensor[0].numel())
                tensor.copy_(noise * fan_in**-0.5)
            else:
                # Set, not moved: constructors draw biases from the global generator.
                tensor.copy_(0.1 * noise + float(name.endswith("weight")))


def tiny_networks(
    seed: int = 0,
) -> tuple[FaceAutoencoder, UNet2DConditionModel, Conditioner, FaceRecognizer]:
    """The four networks of a reference-family model, small and random."""
    generator = torch.Generator().manual_seed(seed)
    autoencoder = FaceAutoencoder(8, (16, 16, 32), (1, 1), (1, 1, 1))
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=2,
    )
    conditioner = Conditioner(32, 24, 5, (16, 16, 16, 16), 2)
    recognizer = FaceRecognizer(8, 16, (16, 16, 32), (1, 1, 1), 20)
    for module in (autoencoder, unet, conditioner, recognizer):
        randomize(module, generator)
        module.eval().requires_grad_(False)
    return autoencoder, unet, conditioner, recognizer


def tiny_components(seed: int = 0) -> Components:
    """A reference-family model with random weights, ready to be exported."""
    autoencoder, unet, conditioner, recognizer = tiny_networks(seed)
    return assemble(
        name="tiny",
        autoencoder=autoencoder,
        unet=unet,
        conditioner=conditioner,
        recognizer=recognizer,
        licence="none: random weights",
    )


def few_state(unet: nn.Module, seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """Random low-rank changes to a network, about a third of its weights' size."""
    network = copy.deepcopy(unet)
    add_low_rank(network, rank)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) * value.shape[1] ** -0.5 * 0.5
        for name, value in low_rank_state(network).items()
    }


def tiny_few_components(seed: int = 5) -> Components:
    """A model with a few-step change drawn from the seed; the rest is the same for all seeds."""
    autoencoder, unet, conditioner, recognizer = tiny_networks(3)
    return assemble(
        name="tiny-few",
        autoencoder=autoencoder,
        unet=unet,
        conditioner=conditioner,
        recognizer=recognizer,
        few=apply_few(unet, few_state(unet, seed)),
        licence="none: random weights",
    )
