"""A small model of the Stable Diffusion family with random weights, for ours and for others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.plans import Guidance, Plan
from diffveil_export.exporter import export_bundle
from diffveil_export.models.irse50 import IRSE50
from diffveil_export.models.msi import MSI
from diffveil_export.models.stable_diffusion import assemble

__all__ = ["SmallDiffusion"]

_VOCABULARY = {"<|startoftext|>": 0, "<|endoftext|>": 1, "*</w>": 2, "a</w>": 3}
_WIDTH = 256


class SmallDiffusion:
    """The networks as a diffusers folder, and as a bundle on the CPU.

    Args:
        folder: Where both are made, if they are not there.
        threads: CPU threads of ours.
    """

    SIDE, STEPS, STRENGTH = 256, 10, 0.8

    def __init__(self, folder: Path, threads: int) -> None:
        self.model = folder / "model"
        bundle = folder / "bundle"
        if not bundle.exists():
            _save(self.model, parts := _parts())
            export_bundle(_assembled(parts), bundle)
        self._programs = Programs(Bundle.load(bundle), ONNXRuntimeCPU(threads))

    def ours(self, evaluations: int) -> Callable[[], object]:
        """Encode a picture, make that many steps without guidance, decode."""
        silent = Guidance(weight=((-1, 0.0),), mode="repel")
        plan = Plan(
            sampler="ddim",
            steps=self.STEPS,
            strength=self.STRENGTH,
            conditional_above=0,
            background_below=0,
            guidance=silent,
            spacing="leading",
        )
        operations = FaceOperations(self._programs)
        made = len(plan.table(operations.schedule).steps)
        if made != evaluations:
            plan = replace(plan, strength=plan.strength * evaluations / made)
            made = len(plan.table(operations.schedule).steps)
        if made != evaluations:
            raise ValueError(f"the plan makes {made} evaluations, expected {evaluations}")
        rng = np.random.default_rng(0)
        image = rng.uniform(-1, 1, (1, 3, self.SIDE, self.SIDE)).astype(np.float32)
        return partial(operations.anonymize, image, plan, keys=[NoiseKey.from_seed(0)])


def _parts() -> dict[str, Any]:
    vae_class: Any = AutoencoderKL
    unet_class: Any = UNet2DConditionModel
    channels = (32, 64, 128, 128)
    tower: dict[str, Any] = {
        "hidden_size": _WIDTH,
        "intermediate_size": 512,
        "num_attention_heads": 4,
    }
    return {
        "vae": vae_class(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=SmallDiffusion.SIDE,
        ),
        "unet": unet_class(
            sample_size=SmallDiffusion.SIDE // 8,
            block_out_channels=(64, 128, 256),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=_WIDTH,
        ),
        "text": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(_VOCABULARY),
                num_hidden_layers=4,
                max_position_embeddings=77,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
                **tower,
            )
        ),
        "vision": CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=12,
                intermediate_size=16,
                num_hidden_layers=17,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            )
        ),
    }


def _assembled(parts: dict[str, Any]) -> Any:
    return assemble(
        name="small",
        vocabulary=_VOCABULARY,
        msi_state=MSI(12, _WIDTH, 16, 8).state_dict(),
        recognizer=IRSE50(10, ((16, 1), (32, 1), (16, 1), (32, 1))),
        licence="none: random weights",
        **parts,
    )


def _save(folder: Path, parts: dict[str, Any]) -> None:
    """A folder that `StableDiffusionImg2ImgPipeline` opens; no vision tower, MSI or recognizer."""
    names = {"vae": "vae", "unet": "unet", "text": "text_encoder"}
    for part, name in names.items():
        parts[part].save_pretrained(folder / name)
    scheduler: Any = DDIMScheduler
    scheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps(_VOCABULARY))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
            }
        )
    )
    index = {
        "_class_name": "StableDiffusionImg2ImgPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
