"""Loads the reference family: `autoencoder/`, `unet/`, `conditioner/` and `recognizer/` folders.

`unet/` is a diffusers folder; the others hold `config.json` (the constructor's arguments) and
`model.safetensors`. `few.safetensors`, low-rank changes to the UNet, makes it a few-step model for
`denoise_few`. A `model.json` beside them may state name, licence, thresholds and provenance;
a `MODEL_CARD.md` goes into the bundle as it is.

A decoder for `guide` to go through comes in a folder of its own, of the same two files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.components import Components, arcface_template, measure_dimensions
from diffveil_export.models._unet import DiffusersUNet
from diffveil_export.models.low_rank import load_low_rank
from diffveil_export.reference.autoencoder import FaceAutoencoder, FaceDecoder
from diffveil_export.reference.conditioner import Conditioner
from diffveil_export.reference.recognizer import FaceRecognizer

__all__ = ["apply_few", "assemble", "is_reference_folder", "load_reference"]

_M = TypeVar("_M", bound=nn.Module)
_PARTS = ("autoencoder", "unet", "conditioner", "recognizer")


class _Embed(nn.Module):
    """`Conditioner.embed` as a module, without the expander's weights."""

    def __init__(self, conditioner: Conditioner) -> None:
        super().__init__()
        self.conditioner = conditioner

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.conditioner.embed(image)


class _Expand(nn.Module):
    """`Conditioner.expand` as a module."""

    def __init__(self, conditioner: Conditioner) -> None:
        super().__init__()
        self.conditioner = conditioner

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.conditioner.expand(tokens)


def assemble(
    *,
    name: str,
    autoencoder: FaceAutoencoder,
    unet: nn.Module,
    conditioner: Conditioner,
    recognizer: FaceRecognizer,
    licence: str,
    thresholds: Mapping[str, float] | None = None,
    provenance: Mapping[str, str] | None = None,
    few: nn.Module | None = None,
    guide_decoder: FaceDecoder | None = None,
    card: str = "",
) -> Components:
    """Join trained networks of the reference family; the recognizer is fused in a copy.

    Args:
        name: Name of the model.
        autoencoder: Decides, with the conditioner, the image size.
        unet: A diffusers `UNet2DConditionModel`.
        conditioner: Vision tower, MSI and expander.
        recognizer: Not changed: a copy has its batch normalisations folded.
        licence: Licence of the weights.
        thresholds: Cosine thresholds by false accept rate.
        provenance: Where the weights come from, by topic.
        few: What `apply_few` made of `unet`, or None.
        guide_decoder: What `guide` goes through instead of the autoencoder's decoder, or None.
        card: Text of the model card.
    """
    # A loader that runs twice on the same recognizer must not fuse it twice.
    fused = copy.deepcopy(recognizer).fuse()
    size = int(conditioner.config["image_size"])  # type: ignore[call-overload]
    for module in (autoencoder, unet, conditioner):
        module.eval()
    embedder, expander = _Embed(conditioner), _Expand(conditioner)
    with torch.no_grad():
        unconditional = conditioner.unconditional().detach().clone()
    return Components(
        name=name,
        autoencoder=autoencoder,
        unet=DiffusersUNet(unet),
        embedder=embedder,
        expander=expander,
        recognizer=fused,
        unconditional=unconditional,
        dimensions=measure_dimensions(size, autoencoder, embedder, expander, fused),
        template=arcface_template(size, recognizer.margin, recognizer.margin, recognizer.size),
        licence=licence,
        thresholds=dict(thresholds or {}),
        provenance=dict(provenance or {}),
        card=card,
        few=None if few is None else DiffusersUNet(few.eval()),
        guide_decoder=guide_decoder,
        source={
            "autoencoder": autoencoder.config,
            "unet": _constructor_arguments(unet),
            "conditioner": conditioner.config,
            "recognizer": recognizer.config,
            **({} if few is None else {"few": {}}),
            **({} if guide_decoder is None else {"guide_decoder": guide_decoder.config}),
        },
    )


def apply_few(unet: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """A few-step model that shares the UNet's own parameters.

    Args:
        unet: Not changed.
        state: Low-rank changes by name, see `models.low_rank`.

    Raises:
        OptionError: They do not fit.
    """
    shared: dict[int, Any] = {id(p): p for p in unet.parameters()}
    few = copy.deepcopy(unet, shared)
    load_low_rank(few, state)
    return few


def _constructor_arguments(unet: Any) -> dict[str, Any]:
    """What diffusers recorded of a model's construction, without its notes on itself."""
    return {k: v for k, v in dict(unet.config).items() if not k.startswith("_")}


def is_reference_folder(folder: Path) -> bool:
    """Whether `folder` is laid out as this module's docstring says."""
    return all((folder / part / "config.json").is_file() for part in ("autoencoder", "conditioner"))


def load_reference(folder: Path, guide_decoder: Path | None = None) -> Components:
    """Load a folder of the reference family.

    Args:
        folder: Laid out as this module's docstring says.
        guide_decoder: Folder of a `FaceDecoder` that `guide` shall go through.

    Raises:
        OptionError: Parts, files, tensors or fields are missing or unexpected; all are named.
    """
    import diffusers

    missing = [
        f"{part}/{file}"
        for part in _PARTS
        for file in (("config.json",) if part == "unet" else ("config.json", "model.safetensors"))
        if not (folder / part / file).is_file()
    ]
    if missing:
        raise OptionError(f"model folder '{folder}' lacks {', '.join(missing)}")
    facts, card = _facts(folder / "model.json"), folder / "MODEL_CARD.md"
    unet_class: Any = diffusers.UNet2DConditionModel  # its methods carry no types
    unet = unet_class.from_pretrained(
        folder / "unet", use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
    )
    few = folder / "few.safetensors"
    autoencoder = _load(FaceAutoencoder, folder / "autoencoder")
    provenance = {k: str(v) for k, v in facts.get("provenance", {}).items()}
    narrow = None
    if guide_decoder is not None:
        narrow = _load_guide_decoder(guide_decoder, autoencoder)
        provenance["guide_decoder"] = guide_decoder.name
    return assemble(
        name=str(facts.get("name", folder.name)),
        autoencoder=autoencoder,
        unet=unet,
        few=apply_few(unet, load_file(few)) if few.is_file() else None,
        conditioner=_load(Conditioner, folder / "conditioner"),
        recognizer=_load(FaceRecognizer, folder / "recognizer"),
        licence=str(facts.get("licence", "not stated")),
        thresholds={k: float(v) for k, v in facts.get("thresholds", {}).items()},
        provenance=provenance,
        guide_decoder=narrow,
        card=card.read_text(encoding="utf-8") if card.is_file() else "",
    )


def _facts(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    facts = json.loads(file.read_text(encoding="utf-8"))
    known = {"name", "licence", "thresholds", "provenance"}
    if not isinstance(facts, dict) or not set(facts) <= known:
        raise OptionError(f"'{file}': expected an object with fields of {sorted(known)}")
    return facts


def _load_guide_decoder(folder: Path, autoencoder: FaceAutoencoder) -> FaceDecoder:
    missing = [f for f in ("config.json", "model.safetensors") if not (folder / f).is_file()]
    if missing:
        raise OptionError(f"--guide-decoder: '{folder}' lacks {', '.join(missing)}")
    decoder = _load(FaceDecoder, folder)
    channels = decoder.config["latent_channels"], autoencoder.config["latent_channels"]
    if channels[0] != channels[1]:
        raise OptionError(
            f"--guide-decoder: '{folder}' decodes {channels[0]} latent channels, the model has "
            f"{channels[1]}"
        )
    return decoder


def _load(kind: type[_M], folder: Path) -> _M:
    """Construct `kind` from a folder's configuration and fill it with its weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    try:
        module = kind(**arguments)
    except TypeError as error:
        raise OptionError(f"'{folder / 'config.json'}': {error}") from error
    result = module.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    problems = [f"missing {n}" for n in result.missing_keys]
    problems += [f"unexpected {n}" for n in result.unexpected_keys]
    if problems:
        raise OptionError(f"'{folder / 'model.safetensors'}': {', '.join(problems)}")
    return module
