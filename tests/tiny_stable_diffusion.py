"""A tiny random model of the Stable Diffusion family, part by part: 32-pixel photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from diffveil_export.models.irse50 import IRSE50
from diffveil_export.models.msi import MSI
from tiny_models import randomize

__all__ = ["STAGES", "VOCABULARY", "parts", "save_folder", "text_encoder", "vision_tower"]

VOCABULARY = {"<|startoftext|>": 30, "<|endoftext|>": 31, "*</w>": 7, "a</w>": 1}
STAGES = ((16, 1), (32, 1), (16, 1), (32, 1))


def text_encoder(generator: torch.Generator) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        bos_token_id=30,
        eos_token_id=31,
        pad_token_id=31,
    )
    model = CLIPTextModel(config)
    randomize(model, generator)
    return model.eval()


def vision_tower(generator: torch.Generator) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=17,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    model = CLIPVisionModel(config)
    randomize(model, generator)
    return model.eval()


def parts() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    msi = MSI(vision_width=12, width=16, inner=16, heads=8)
    recognizer = IRSE50(10, STAGES)
    for module in (vae, unet, msi, recognizer):
        randomize(module, generator)
    return {
        "vae": vae,
        "unet": unet,
        "text": text_encoder(generator),
        "vision": vision_tower(generator),
        "msi_state": msi.state_dict(),
        "recognizer": recognizer,
    }


def save_folder(directory: Path) -> Path:
    """A diffusers folder with everything, beside `msi.safetensors` and `ir.pth`."""
    made = parts()
    model = directory / "model"
    made["vae"].save_pretrained(model / "vae")
    made["unet"].save_pretrained(model / "unet")
    made["text"].save_pretrained(model / "text_encoder")
    made["vision"].save_pretrained(model / "image_encoder")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(model / "scheduler")
    (model / "tokenizer").mkdir()
    (model / "tokenizer" / "vocab.json").write_text(json.dumps(VOCABULARY))
    save_file(made["msi_state"], directory / "msi.safetensors")
    torch.save(made["recognizer"].state_dict(), directory / "ir.pth")
    return model
