"""Stable Diffusion 1.x in one file, in the tensor names of the original release (LDM).

The three networks are built from the shapes of the tensors and loaded strictly:

    model.diffusion_model.…                    UNet
    first_stage_model.…                        VAE
    cond_stage_model.transformer.text_model.…  CLIP text encoder

What training left behind (averages, noise schedule, loss networks, positions) is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.sources.pickles import read_pickled_tensors
from diffveil_export.sources.states import read_state

__all__ = ["CLIP_VOCABULARY", "SingleFile", "is_single_file", "read_single_file"]

CLIP_VOCABULARY: Mapping[str, int] = {
    "<|startoftext|>": 49406,
    "<|endoftext|>": 49407,
    "*</w>": 265,
}
"""The three entries that prompts here need, of the vocabulary that every SD 1.x shares."""

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_TEXT = "cond_stage_model.transformer."
_HEADS = 8  # of every attention in SD 1.x; shapes do not tell
_HEAD_WIDTH = 64  # of CLIP
_EXTRA = re.compile(
    r"model_ema\.|first_stage_model\.loss\.|cond_stage_model\.transformer\.text_model\.embeddings\."
    r"position_ids$|(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_\w+|log_one_minus_\w+|"
    r"posterior_\w+|lvlb_weights|logvar|scale_factor)$"
)


@dataclass(frozen=True)
class SingleFile:
    """The networks of one file, in float32 and evaluation mode.

    Attributes:
        unet: diffusers `UNet2DConditionModel`.
        vae: diffusers `AutoencoderKL`.
        text: transformers `CLIPTextModel`.
    """

    unet: Any
    vae: Any
    text: Any


def is_single_file(path: Path) -> bool:
    """Whether a path is named like a checkpoint of this kind."""
    return path.is_file() and path.suffix in (".safetensors", ".ckpt")


def read_single_file(file: Path, *, latent_size: int = 64) -> SingleFile:
    """Build and load the networks of a file.

    Args:
        file: `.safetensors`, or `.ckpt`, of which nothing but tensors is read.
        latent_size: Side of the latents, which no tensor tells; 64 for photos of 512 pixels.

    Raises:
        OptionError: The file cannot be read or is no SD 1.x; all missing and unexpected tensors
            are named.
    """
    if file.suffix == ".safetensors":
        state: Mapping[str, torch.Tensor] = read_state(file)
    else:
        state = read_pickled_tensors(file)
    state = {name.removeprefix("state_dict."): tensor for name, tensor in state.items()}
    state = {
        name: t for name, t in state.items() if t.is_floating_point() and not _EXTRA.match(name)
    }
    try:
        unet, vae, text = _unet(state, latent_size), _vae(state, latent_size * 8), _text(state)
    except KeyError as error:
        raise OptionError(
            f"'{file}' is no Stable Diffusion 1.x checkpoint in the original layout: tensor "
            f"{error} is missing; it holds {', '.join(list(state)[:5]) or 'no tensors'}"
        ) from error
    layers = int(unet.config.layers_per_block)
    levels = len(vae.config.block_out_channels)
    with_attention = [kind.startswith("Cross") for kind in unet.config.up_block_types]
    parts: list[tuple[nn.Module, str, Callable[[str], str]]] = [
        (unet, _UNET, lambda name: _unet_name(name, layers, with_attention)),
        (vae, _VAE, lambda name: _vae_name(name, levels)),
        (
            text,
            _TEXT,
            lambda name: name if name.startswith("text_model.") else f"text_model.{name}",
        ),
    ]
    problems: list[str] = []
    used: set[str] = set()
    for module, prefix, rename in parts:
        problems += _load(module, prefix, rename, state, used)
    problems += [f"unexpected {name}" for name in state if name not in used]
    if problems:
        raise OptionError(f"'{file}': " + "; ".join(problems))
    return SingleFile(unet.eval(), vae.eval(), text.eval())


def _load(
    module: nn.Module,
    prefix: str,
    rename: Callable[[str], str],
    state: Mapping[str, torch.Tensor],
    used: set[str],
) -> list[str]:
    """Copy a network's tensors; returns what is missing or has another shape."""
    problems = []
    for name, parameter in module.state_dict().items():
        if name.endswith("position_ids"):
            continue
        source = prefix + rename(name)
        tensor = state.get(source)
        if tensor is None:
            problems.append(f"missing {source}")
            continue
        used.add(source)
        if tensor.numel() == parameter.numel() and tensor.ndim == parameter.ndim + 2:
            tensor = tensor.reshape(parameter.shape)  # attention as convolutions of one pixel
        if tensor.shape != parameter.shape:
            received, expected = list(tensor.shape), list(parameter.shape)
            problems.append(f"{source}: received {received}, expected {expected}")
            continue
        parameter.copy_(tensor.float())
    return problems


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """Highest number that the pattern's group finds, plus one."""
    found = (re.match(pattern, name) for name in state)
    return max((int(m.group(1)) + 1 for m in found if m), default=0)


def _unet(state: Mapping[str, torch.Tensor], latent_size: int) -> Any:
    import diffusers

    root = re.escape(_UNET)
    blocks = _count(state, rf"{root}input_blocks\.(\d+)\.")
    downs = {i for i in range(1, blocks) if f"{_UNET}input_blocks.{i}.0.op.weight" in state}
    layers = min(downs, default=blocks) - 1
    if layers < 1 or blocks % (layers + 1):
        raise KeyError(f"{_UNET}input_blocks.1.0.in_layers.0.weight")
    widths, attention = [], []
    for first in range(1, blocks, layers + 1):
        widths.append(len(state[f"{_UNET}input_blocks.{first}.0.out_layers.3.weight"]))
        attention.append(f"{_UNET}input_blocks.{first}.1.proj_in.weight" in state)
    middle = f"{_UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    kinds = [("CrossAttn" if a else "") for a in attention]
    unet_class: Any = diffusers.UNet2DConditionModel
    return unet_class(
        sample_size=latent_size,
        in_channels=state[f"{_UNET}input_blocks.0.0.weight"].shape[1],
        out_channels=state[f"{_UNET}out.2.weight"].shape[0],
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        cross_attention_dim=state[middle].shape[1],
        attention_head_dim=_HEADS,
        use_linear_projection=state[f"{_UNET}middle_block.1.proj_in.weight"].ndim == 2,
    )


def _vae(state: Mapping[str, torch.Tensor], image_size: int) -> Any:
    import diffusers

    root = re.escape(_VAE)
    levels = _count(state, rf"{root}encoder\.down\.(\d+)\.")
    layers = _count(state, rf"{root}encoder\.down\.0\.block\.(\d+)\.")
    widths = [len(state[f"{_VAE}encoder.down.{i}.block.0.conv2.weight"]) for i in range(levels)]
    vae_class: Any = diffusers.AutoencoderKL
    return vae_class(
        in_channels=state[f"{_VAE}encoder.conv_in.weight"].shape[1],
        out_channels=state[f"{_VAE}decoder.conv_out.weight"].shape[0],
        latent_channels=state[f"{_VAE}post_quant_conv.weight"].shape[0],
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=image_size,
    )


def _text(state: Mapping[str, torch.Tensor]) -> Any:
    import transformers

    root = f"{_TEXT}text_model."
    rows, width = state[f"{root}embeddings.token_embedding.weight"].shape
    pattern = rf"{re.escape(root)}encoder\.layers\.(\d+)\."
    config = transformers.CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=len(state[f"{root}encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_count(state, pattern),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        max_position_embeddings=len(state[f"{root}embeddings.position_embedding.weight"]),
        bos_token_id=rows - 2,
        eos_token_id=rows - 1,
    )
    return transformers.CLIPTextModel(config)


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet_name(name: str, layers: int, up_attention: list[bool]) -> str:
    """LDM's name of a tensor of diffusers' UNet."""
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    block, _, rest = name.partition(".")
    if block == "mid_block":
        kind, index, rest = rest.split(".", 2)
        place = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{_resnet(rest) if kind == 'resnets' else rest}"
    level_text, kind, index, rest = rest.split(".", 3)
    level, layer = int(level_text), int(index)
    if block == "down_blocks":
        if kind == "downsamplers":
            rest = rest.removeprefix("conv.")
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest}"
        number = f"input_blocks.{1 + level * (layers + 1) + layer}"
    else:
        if kind == "upsamplers":
            place = 2 if up_attention[level] else 1
            return f"output_blocks.{level * (layers + 1) + layers}.{place}.{rest}"
        number = f"output_blocks.{level * (layers + 1) + layer}"
    return f"{number}.0.{_resnet(rest)}" if kind == "resnets" else f"{number}.1.{rest}"


def _resnet(rest: str) -> str:
    part, _, kind = rest.partition(".")
    return f"{_RESNET[part]}.{kind}"


_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _vae_name(name: str, levels: int) -> str:
    """LDM's name of a tensor of diffusers' VAE."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    side, _, rest = name.partition(".")
    if rest.startswith("mid_block.attentions.0."):
        part, _, kind = rest.removeprefix("mid_block.attentions.0.").rpartition(".")
        return f"{side}.mid.attn_1.{_VAE_ATTENTION[part]}.{kind}"
    if found := re.match(r"mid_block\.resnets\.(\d)\.(.*)", rest):
        return f"{side}.mid.block_{int(found[1]) + 1}.{found[2]}"
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|\w+samplers)\.(\d+)\.(.*)", rest):
        way, level, kind, layer, end = found.groups()
        place = levels - 1 - int(level) if way == "up" else int(level)
        what = f"block.{layer}" if kind == "resnets" else f"{way}sample"
        return f"{side}.{way}.{place}.{what}.{end}"
    return name
