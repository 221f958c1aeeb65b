"""Low-rank adapters (Hu et al. 2021, LoRA), fused into the weights before anything is exported.

    W ← W + scale · (alpha / rank) · up · down

Names of tensors, as the common trainers write them, for a layer `P` of diffusers' UNet or of the
text encoder (`text_encoder.P`, `lora_te_P`):

    unet.P.lora_A.weight, unet.P.lora_B.weight             PEFT
    unet.P.lora.down.weight, unet.P.lora.up.weight         diffusers; also P.processor.to_q_lora.…
    lora_unet_P.lora_down.weight, ….lora_up.weight, ….alpha  kohya, dots in P as underscores
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.sources.states import read_state

__all__ = ["fuse_lora", "parse_lora"]

_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "down.weight": "down",
    "up.weight": "up",
    "alpha": "alpha",
}
_PREFIXES = {"unet": ("unet.", "lora_unet_"), "text": ("text_encoder.", "lora_te_", "lora_te1_")}


@dataclass
class _Adapter:
    """The tensors of one layer."""

    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


def parse_lora(text: str) -> tuple[Path, float]:
    """File and scale of `FILE` or `FILE:SCALE`.

    Raises:
        OptionError: The scale is no number.
    """
    file, colon, scale = text.rpartition(":")
    if not colon or not re.fullmatch(r"[-+0-9.eE]+", scale):
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise OptionError(f"--lora: received '{text}', expected FILE or FILE:SCALE")
    return Path(file), value


def fuse_lora(unet: nn.Module, text: nn.Module, file: Path, scale: float = 1.0) -> dict[str, str]:
    """Add an adapter to the weights, in place; all or nothing.

    Args:
        unet: diffusers `UNet2DConditionModel`, in float32.
        text: transformers `CLIPTextModel`, in float32.
        file: The adapter, safetensors.
        scale: How much of it to add.

    Returns:
        What provenance states: file name, hash and scale.

    Raises:
        OptionError: The file is no safetensors file, or a tensor fits no layer; all are named.
    """
    if file.suffix != ".safetensors":
        raise OptionError(f"--lora: '{file}' is not named .safetensors; convert it first")
    if not file.is_file():
        raise OptionError(f"--lora: there is no file '{file}'")
    layers = dict(_layers(unet, text))
    problems = _refused_metadata(file)
    changes: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer, adapter in _group(read_state(file), layers, problems).items():
        weight = layers[layer]
        delta = _delta(adapter, weight)
        if delta is not None and not delta.isfinite().all():
            problems.append(f"{', '.join(adapter.names)} are not finite")
        elif delta is None:
            problems.append(f"{', '.join(adapter.names)} do not fit weight {list(weight.shape)}")
        else:
            changes.append((weight, delta))
    if problems:
        raise OptionError(f"--lora: '{file}': " + "; ".join(problems))
    if not changes:
        raise OptionError(f"--lora: '{file}' holds no adapter")
    with torch.no_grad():
        for weight, delta in changes:
            weight.add_(delta, alpha=scale)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"lora": f"{file.name} sha256 {digest} scale {scale:g}, {len(changes)} layers"}


def _layers(unet: nn.Module, text: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights that adapters may change, by every name that they are called."""
    for kind, module in (("unet", unet), ("text", text)):
        for path, layer in module.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            paths = {path}
            if kind == "text":
                # transformers put `text_model` around the encoder until its version 5.
                inner = path.removeprefix("text_model.")
                paths = {inner, f"text_model.{inner}"}
            for name in paths:
                for prefix in _PREFIXES[kind]:
                    flat = prefix.startswith("lora_")
                    yield prefix + (name.replace(".", "_") if flat else name), layer.weight


def _refused_metadata(file: Path) -> list[str]:
    """What the header says about strengths that the tensors do not: it is not guessed at."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            stated = (opened.metadata() or {}).get("lora_adapter_metadata")
    except SafetensorError as error:
        raise OptionError(f"--lora: '{file}' is not a safetensors file: {error}") from error
    if stated is None:
        return []
    try:
        fields = json.loads(stated)
        plain = {name.rpartition(".")[2]: value for name, value in fields.items()}
    except (ValueError, AttributeError):
        return ["its header's lora_adapter_metadata cannot be read"]
    problems = [f"its header asks for {n}" for n in ("use_dora", "use_rslora") if plain.get(n)]
    problems += [f"its header has an {n}" for n in ("alpha_pattern",) if plain.get(n)]
    for name, alpha in fields.items():
        if name.endswith("lora_alpha"):
            rank = fields.get(name.removesuffix("lora_alpha") + "r")
            if alpha != rank:
                problems.append(
                    f"its header states alpha {alpha} at rank {rank}: give the quotient as scale, "
                    "and save the adapter without this header"
                )
    return problems


def _group(
    state: Mapping[str, torch.Tensor], layers: Mapping[str, torch.Tensor], problems: list[str]
) -> dict[str, _Adapter]:
    """Tensors by layer; what belongs to none goes to `problems`."""
    adapters: dict[str, _Adapter] = {}
    for name, tensor in state.items():
        part = next((p for p in _PARTS if name.endswith(f".{p}")), None)
        layer = name.removesuffix(f".{part}") if part else name
        if found := re.fullmatch(r"(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora", layer):
            layer = f"{found[1]}.{found[2]}" + (".0" if found[2] == "to_out" else "")
        if part is None or layer not in layers:
            problems.append(f"{name} fits no layer")
            continue
        adapter = adapters.setdefault(layer, _Adapter())
        adapter.parts[_PARTS[part]] = tensor.float()
        adapter.names.append(name)
    return adapters


def _delta(adapter: _Adapter, weight: torch.Tensor) -> torch.Tensor | None:
    """What a layer's weight gains at scale 1; None if the parts do not fit it."""
    down, up = adapter.parts.get("down"), adapter.parts.get("up")
    if down is None or up is None or up.ndim < 2 or down.ndim < 2:
        return None
    rank = down.shape[0]
    # A convolution's adapter is a narrow convolution, then one of a single pixel.
    if up.shape[1] != rank or up[0, 0].numel() != 1:
        return None
    product = up.flatten(1) @ down.flatten(1)
    if product.numel() != weight.numel() or len(product) != len(weight):
        return None
    if down[0].numel() != weight[0].numel() or (
        down.ndim == 4 and down.shape[1:] != weight.shape[1:]
    ):
        return None
    alpha = float(adapter.parts["alpha"]) if "alpha" in adapter.parts else float(rank)
    return product.reshape(weight.shape) * (alpha / rank)
