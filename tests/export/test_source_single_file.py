"""Single files in the original layout, written here module by module, and read back."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffveil.errors import OptionError
from diffveil_export.sources.single_file import CLIP_VOCABULARY, read_single_file
from tiny_models import randomize

State = dict[str, torch.Tensor]


def _networks() -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(6)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=40,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=7,
            bos_token_id=38,
            eos_token_id=39,
        )
    )
    for module in (unet, vae, text):
        randomize(module, generator)
        module.eval()
    return unet, vae, text


def _put(state: State, prefix: str, module: nn.Module, *, pixels: bool = False) -> None:
    for name, tensor in module.state_dict().items():
        if pixels and name == "weight":
            tensor = tensor[:, :, None, None]
        state[f"{prefix}.{name}"] = tensor.clone()


def _put_resnet(state: State, prefix: str, resnet: Any) -> None:
    _put(state, f"{prefix}.in_layers.0", resnet.norm1)
    _put(state, f"{prefix}.in_layers.2", resnet.conv1)
    _put(state, f"{prefix}.emb_layers.1", resnet.time_emb_proj)
    _put(state, f"{prefix}.out_layers.0", resnet.norm2)
    _put(state, f"{prefix}.out_layers.3", resnet.conv2)
    if resnet.conv_shortcut is not None:
        _put(state, f"{prefix}.skip_connection", resnet.conv_shortcut)


def _put_vae_resnet(state: State, prefix: str, resnet: Any) -> None:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        _put(state, f"{prefix}.{part}", getattr(resnet, part))
    if resnet.conv_shortcut is not None:
        _put(state, f"{prefix}.nin_shortcut", resnet.conv_shortcut)


def _original_layout(unet: Any, vae: Any, text: Any) -> State:
    """The release counts a UNet's blocks in the order in which they run."""
    state: State = {}
    root = "model.diffusion_model"
    _put(state, f"{root}.time_embed.0", unet.time_embedding.linear_1)
    _put(state, f"{root}.time_embed.2", unet.time_embedding.linear_2)
    _put(state, f"{root}.input_blocks.0.0", unet.conv_in)
    count = 1
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            _put_resnet(state, f"{root}.input_blocks.{count}.0", resnet)
            if attention is not None:
                _put(state, f"{root}.input_blocks.{count}.1", attention)
            count += 1
        for down in block.downsamplers or []:
            _put(state, f"{root}.input_blocks.{count}.0.op", down.conv)
            count += 1
    _put_resnet(state, f"{root}.middle_block.0", unet.mid_block.resnets[0])
    _put(state, f"{root}.middle_block.1", unet.mid_block.attentions[0])
    _put_resnet(state, f"{root}.middle_block.2", unet.mid_block.resnets[1])
    count = 0
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for index, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
            _put_resnet(state, f"{root}.output_blocks.{count}.0", resnet)
            place = 1
            if attention is not None:
                _put(state, f"{root}.output_blocks.{count}.1", attention)
                place = 2
            if index == len(block.resnets) - 1 and block.upsamplers:
                _put(state, f"{root}.output_blocks.{count}.{place}.conv", block.upsamplers[0].conv)
            count += 1
    _put(state, f"{root}.out.0", unet.conv_norm_out)
    _put(state, f"{root}.out.2", unet.conv_out)

    root = "first_stage_model"
    _put(state, f"{root}.quant_conv", vae.quant_conv)
    _put(state, f"{root}.post_quant_conv", vae.post_quant_conv)
    for side in ("encoder", "decoder"):
        half = getattr(vae, side)
        _put(state, f"{root}.{side}.conv_in", half.conv_in)
        _put(state, f"{root}.{side}.norm_out", half.conv_norm_out)
        _put(state, f"{root}.{side}.conv_out", half.conv_out)
        _put_vae_resnet(state, f"{root}.{side}.mid.block_1", half.mid_block.resnets[0])
        _put_vae_resnet(state, f"{root}.{side}.mid.block_2", half.mid_block.resnets[1])
        attention = half.mid_block.attentions[0]
        _put(state, f"{root}.{side}.mid.attn_1.norm", attention.group_norm)
        for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v")):
            _put(state, f"{root}.{side}.mid.attn_1.{ours}", getattr(attention, theirs), pixels=True)
        _put(state, f"{root}.{side}.mid.attn_1.proj_out", attention.to_out[0], pixels=True)
    for level, block in enumerate(vae.encoder.down_blocks):
        for index, resnet in enumerate(block.resnets):
            _put_vae_resnet(state, f"{root}.encoder.down.{level}.block.{index}", resnet)
        for down in block.downsamplers or []:
            _put(state, f"{root}.encoder.down.{level}.downsample.conv", down.conv)
    for level, block in enumerate(reversed(vae.decoder.up_blocks)):
        for index, resnet in enumerate(block.resnets):
            _put_vae_resnet(state, f"{root}.decoder.up.{level}.block.{index}", resnet)
        for up in block.upsamplers or []:
            _put(state, f"{root}.decoder.up.{level}.upsample.conv", up.conv)

    inner = getattr(text, "text_model", text)
    _put(state, "cond_stage_model.transformer.text_model", inner)
    # What the release's files hold besides.
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(7.0)
    state["model_ema.diffusion_modeltime_embed0weight"] = torch.zeros(3)
    state["alphas_cumprod"] = torch.zeros(1000)
    state["first_stage_model.loss.logvar"] = torch.zeros(1)
    return state


@pytest.fixture(scope="module")
def networks() -> tuple[Any, Any, Any]:
    return _networks()


@pytest.fixture(scope="module")
def state(networks: tuple[Any, Any, Any]) -> State:
    return _original_layout(*networks)


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_networks_come_back(
    suffix: str, networks: tuple[Any, Any, Any], state: State, tmp_path: Path
) -> None:
    file = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        # As training frameworks leave them: scores as NumPy scalars, callbacks by class.
        extra = {"epoch": 3, "best": np.float64(0.5), "callbacks": {"kind": OrderedDict(a=1)}}
        torch.save({"state_dict": state, **extra}, file)
    else:
        save_file({n: t.half() if t.ndim > 1 else t for n, t in state.items()}, file)
    read = read_single_file(file, latent_size=8)
    for ours, original in zip((read.unet, read.vae, read.text), networks, strict=True):
        tensors = original.state_dict()
        loaded = {n: t for n, t in ours.state_dict().items() if not n.endswith("position_ids")}
        assert set(loaded) == {n for n in tensors if not n.endswith("position_ids")}
        for name, tensor in loaded.items():
            halved = tensors[name].ndim > 1 and suffix == ".safetensors"
            expected = tensors[name].half().float() if halved else tensors[name]
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    if suffix == ".ckpt":
        generator = torch.Generator().manual_seed(1)
        latent = torch.randn(2, 4, 8, 8, generator=generator)
        context = torch.randn(2, 7, 64, generator=generator)
        t = torch.tensor([3, 700])
        expected = networks[0](latent, t, context).sample
        torch.testing.assert_close(read.unet(latent, t, context).sample, expected)
        image = torch.randn(1, 3, 64, 64, generator=generator)
        torch.testing.assert_close(read.vae(image).sample, networks[1](image).sample)
        ids = torch.tensor([[38, 4, 39, 39, 39, 39, 39]])
        torch.testing.assert_close(read.text(ids)[0], networks[2](ids)[0])


def test_every_wrong_tensor_is_named(state: State, tmp_path: Path) -> None:
    changed = dict(state)
    gone = "model.diffusion_model.output_blocks.1.1.conv.weight"
    moved = "first_stage_model.decoder.mid.attn_1.q.bias"
    resized = "model.diffusion_model.time_embed.2.bias"
    assert {gone, moved, resized} <= set(changed)
    del changed[gone]
    changed["surprise.weight"] = changed.pop(moved)
    changed[resized] = torch.zeros(5)
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(OptionError) as caught:
        read_single_file(tmp_path / "model.safetensors", latent_size=8)
    message = str(caught.value)
    assert f"missing {gone}" in message
    assert f"missing {moved}" in message
    assert "unexpected surprise.weight" in message
    assert f"{resized}: received [5], expected [128]" in message
    assert "model_ema" not in message


@pytest.mark.parametrize("kept", ["nothing", "first_stage_model", "model.diffusion_model"])
def test_other_checkpoints_are_refused(kept: str, state: State, tmp_path: Path) -> None:
    part = {name: t for name, t in state.items() if name.startswith(kept)}
    save_file({**part, "weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match=r"no Stable Diffusion 1\.x checkpoint"):
        read_single_file(tmp_path / "model.safetensors")


def test_vocabulary_follows_from_the_byte_table() -> None:
    """CLIP numbers printable bytes from '!' on, then the same with the end-of-word mark."""
    assert CLIP_VOCABULARY["*</w>"] == 256 + ord("*") - ord("!")
    assert re.fullmatch(r"<\|.*\|>", next(iter(CLIP_VOCABULARY)))
