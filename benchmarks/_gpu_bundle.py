"""A bundle of Stable Diffusion's shape with random weights, at full size or tiny."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from diffveil.bundle import Bundle
from diffveil_export.components import Components
from diffveil_export.exporter import export_bundle
from diffveil_export.latent_guide import add_latent_guide
from diffveil_export.latent_recognizer import LatentRecognizer
from diffveil_export.loop_programs import add_loop_programs
from diffveil_export.models.irse50 import IRSE50
from diffveil_export.models.msi import MSI
from diffveil_export.models.stable_diffusion import assemble
from diffveil_export.precision import Precision
from diffveil_export.sources.single_file import CLIP_VOCABULARY
from diffveil_export.step import fuse_step

__all__ = ["SIZES", "Size", "make_bundle", "random_components"]


@dataclass(frozen=True)
class Size:
    """Constructor arguments of every network, and the sizes of the GAN beside it.

    Attributes:
        vae: Of diffusers' `AutoencoderKL`, blocks by channels.
        unet: Of diffusers' `UNet2DConditionModel`.
        text: Of transformers' `CLIPTextConfig`.
        vision: Of transformers' `CLIPVisionConfig`.
        msi: Of `MSI`.
        recognizer: Of `IRSE50`.
        vocabulary: Token numbers of the prompt.
        generator: Side of the GAN's pictures, and most channels of its layers.
        encoder: Side of the GAN's encoder input, and the width of its layers.
    """

    vae: dict[str, Any]
    unet: dict[str, Any]
    text: dict[str, int]
    vision: dict[str, int]
    msi: tuple[int, int, int, int]
    recognizer: tuple[Any, ...]
    vocabulary: dict[str, int]
    generator: tuple[int, int]
    encoder: tuple[int, int]


def _vae(channels: tuple[int, ...], layers: int, side: int, **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": layers,
        "latent_channels": 4,
        "sample_size": side,
        **more,
    }


def _tower(width: int, inner: int, layers: int, heads: int, **more: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


SIZES = {
    # Stable Diffusion 1.x, CLIP ViT-L/14, IR-SE50: 512² photos.
    "sd1": Size(
        vae=_vae((128, 256, 512, 512), 2, 512),
        unet={"sample_size": 64, "cross_attention_dim": 768},
        text=_tower(768, 3072, 12, 12, vocab_size=49408, max_position_embeddings=77),
        vision=_tower(1024, 4096, 24, 16, image_size=224, patch_size=14),
        msi=(1024, 768, 320, 8),
        recognizer=(),
        vocabulary=dict(CLIP_VOCABULARY),
        generator=(1024, 512),
        encoder=(256, 512),
    ),
    # The same shape for a test on a CPU: 32² photos.
    "tiny": Size(
        vae=_vae((8, 16), 1, 32, norm_num_groups=4),
        unet={
            "sample_size": 16,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
        },
        text=_tower(
            16,
            24,
            2,
            2,
            vocab_size=32,
            max_position_embeddings=9,
            bos_token_id=30,
            eos_token_id=31,
            pad_token_id=31,
        ),
        vision=_tower(12, 16, 17, 2, image_size=28, patch_size=14),
        msi=(12, 16, 16, 8),
        recognizer=(10, ((16, 1), (32, 1), (16, 1), (32, 1))),
        vocabulary={"<|startoftext|>": 30, "<|endoftext|>": 31, "*</w>": 7, "a</w>": 1},
        generator=(16, 16),
        encoder=(64, 16),
    ),
}
"""By name."""


def random_components(size: Size) -> Components:
    """The networks, with the weights that their constructors draw."""
    # Sizes go in by name, which the constructors' types do not foresee.
    text_config: Any = CLIPTextConfig
    vision_config: Any = CLIPVisionConfig
    vae_class: Any = AutoencoderKL
    unet_class: Any = UNet2DConditionModel
    recognizer = IRSE50(*size.recognizer)
    # An untrained batch normalisation that divides by one lets deep networks overflow float16.
    for module in recognizer.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_var.fill_(2.0)
    components = assemble(
        name="random",
        vae=vae_class(**size.vae),
        unet=unet_class(**size.unet),
        text=CLIPTextModel(text_config(**size.text)),
        vision=CLIPVisionModel(vision_config(**size.vision)),
        vocabulary=size.vocabulary,
        msi_state=MSI(*size.msi).state_dict(),
        recognizer=recognizer,
        licence="none: random weights",
    )
    # A few-step denoiser costs what its teacher does; here it has the very same weights.
    shared: dict[int, Any] = {id(p): p for p in components.modules()["unet"].parameters()}
    return replace(components, few=copy.deepcopy(components.unet, shared))


def make_bundle(
    components: Components,
    target: Path,
    workspace: Path,
    precision: Precision,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Export with every optional program that speed depends on.

    Args:
        components: The networks; rounded in place to how they are stored.
        target: Folder to create.
        workspace: A folder that is there, for what comes before.
        precision: Type of the arithmetic.
        progress: Told what begins.

    Returns:
        A bundle with `denoise_few`, `guide_latent`, `step` and those of whole loops.
    """
    plain = export_bundle(components, workspace / "plain", precision=precision, progress=progress)
    d = plain.bundle.dimensions
    student = LatentRecognizer(d.latent_channels, d.latent_size, d.embedding_width).eval()
    guided = add_latent_guide(plain.bundle, student, workspace / "guided")
    fused = fuse_step(guided, workspace / "fused")
    return add_loop_programs(fused, target)
