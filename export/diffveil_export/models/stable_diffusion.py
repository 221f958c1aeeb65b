"""Loads the Stable Diffusion 1.x family: a diffusers folder, a repository of the hub in the same
layout or one file in the original layout, with MSI weights and a recognizer.

MODEL/vae, MODEL/unet            diffusers AutoencoderKL and UNet2DConditionModel
MODEL/text_encoder, tokenizer    transformers CLIPTextModel, and the tokenizer's vocab.json
MODEL/image_encoder              transformers CLIPVisionModel (another folder may be named)
--msi                            MSI weights, safetensors or as the research release pickled them
--recognizer                     one or more recognizers, see `diffveil_export.models.recognizers`
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffveil.errors import OptionError
from diffveil.schedule import NoiseSchedule
from diffveil_export.components import Components, arcface_template, measure_dimensions
from diffveil_export.models._unet import DiffusersUNet
from diffveil_export.models.bisenet import load_parser
from diffveil_export.models.clip import MSIInput, TextExpander, VisionEmbedder
from diffveil_export.models.msi import msi_from_state
from diffveil_export.models.recognizers import load_recognizer
from diffveil_export.models.tiny_decoder import load_tiny_decoder
from diffveil_export.resize import LinearResize, bilinear, crop, pool, separable_matrix
from diffveil_export.sources.hub import Repository, open_hub
from diffveil_export.sources.lora import fuse_lora
from diffveil_export.sources.msi_weights import read_msi
from diffveil_export.sources.single_file import CLIP_VOCABULARY, is_single_file, read_single_file

__all__ = [
    "CroppedRecognizer",
    "assemble",
    "is_stable_diffusion_folder",
    "load_stable_diffusion",
]

_VOCABULARY = "vocab.json"
_CLIP_ROWS = 49408
_ROWS, _COLUMNS = (35, 223), (32, 220)  # of a 256-pixel photo: the published method's framing
_DEFAULT_SCALE = 0.18215


class ScaledAutoencoder(nn.Module):
    """Adapts `diffusers.AutoencoderKL`: posterior mean, scaled to unit variance."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(getattr(vae.config, "scaling_factor", None) or _DEFAULT_SCALE)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, s, s] of images [B, 3, S, S] in [-1, 1]."""
        moments = self.vae.encoder(image)
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        mean: torch.Tensor = moments.chunk(2, dim=1)[0]
        return mean * self.scale

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, S, S] of latents [B, C, s, s]."""
        latent = latent / self.scale
        if self.vae.post_quant_conv is not None:
            latent = self.vae.post_quant_conv(latent)
        image: torch.Tensor = self.vae.decoder(latent)
        return image


class CroppedRecognizer(nn.Module):
    """Cuts the published framing out of a photo and embeds it.

    The photo is resized to 256 pixels, rows 35…222 and columns 32…219 are kept and pooled to 112:
    two constant matrices in all.

    Args:
        recognizer: Maps [B, 3, 112, 112] in [-1, 1] to unit embeddings [B, E].
        image_size: Side S of the photos in pixels.
    """

    def __init__(self, recognizer: nn.Module, image_size: int) -> None:
        super().__init__()
        self.recognizer = recognizer
        self.resize = LinearResize(
            separable_matrix(image_size, bilinear(256), crop(*_ROWS), pool(112)),
            separable_matrix(image_size, bilinear(256), crop(*_COLUMNS), pool(112)),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Unit embeddings [B, E] of photos [B, 3, S, S] in [-1, 1]."""
        embedding: torch.Tensor = self.recognizer(self.resize(image))
        return embedding


def assemble(
    *,
    name: str,
    vae: Any,
    unet: Any,
    text: Any,
    vision: Any,
    vocabulary: Mapping[str, int],
    msi_state: Mapping[str, torch.Tensor],
    recognizer: nn.Module,
    msi_input: MSIInput = "rgb",
    msi_heads: int = 8,
    schedule: NoiseSchedule | None = None,
    licence: str = "that of the source weights",
    provenance: Mapping[str, str] | None = None,
) -> Components:
    """Join loaded parts.

    Args:
        name: Name of the model.
        vae: diffusers `AutoencoderKL`.
        unet: diffusers `UNet2DConditionModel`; its `sample_size` decides the image size.
        text: transformers `CLIPTextModel`.
        vision: transformers `CLIPVisionModel`.
        vocabulary: Token numbers by text, as in `vocab.json`.
        msi_state: MSI weights by name.
        recognizer: Maps [B, 3, 112, 112] in [-1, 1] to unit embeddings.
        msi_input: See `VisionEmbedder`.
        msi_heads: Attention heads of MSI.
        schedule: Noise schedule of the UNet; by default SD 1.x's.
        licence: Licence of the weights.
        provenance: Where the weights come from, by topic.

    Raises:
        OptionError: Parts do not fit each other.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = int(unet.config.sample_size) * factor
    prompt, empty = _prompts(vocabulary, int(text.config.max_position_embeddings))
    for module in (vae, unet, text, vision, recognizer):
        module.eval().requires_grad_(False)
    autoencoder = ScaledAutoencoder(vae)
    embedder = VisionEmbedder(vision, msi_from_state(msi_state, msi_heads), size, msi_input)
    expander = TextExpander(text, prompt, position=1)
    cropped = CroppedRecognizer(recognizer, size)
    with torch.no_grad():
        unconditional = TextExpander(text, empty, position=1).encode_prompt()
    dimensions = measure_dimensions(size, autoencoder, embedder, expander, cropped)
    if dimensions.conditioning_width != unet.config.cross_attention_dim:
        raise OptionError(
            f"text encoder and UNet do not fit: the encoder's width is "
            f"{dimensions.conditioning_width}, the UNet attends to "
            f"{unet.config.cross_attention_dim}"
        )
    scale = size / 256
    return Components(
        name=name,
        autoencoder=autoencoder,
        unet=DiffusersUNet(unet),
        embedder=embedder,
        expander=expander,
        recognizer=cropped,
        unconditional=unconditional,
        dimensions=dimensions,
        template=arcface_template(
            size, _COLUMNS[0] * scale, _ROWS[0] * scale, (_ROWS[1] - _ROWS[0]) * scale
        ),
        licence=licence,
        schedule=schedule or NoiseSchedule(),
        provenance={**(provenance or {}), "msi_input": msi_input},
    )


def is_stable_diffusion_folder(folder: Path) -> bool:
    """Whether `folder` is laid out as this module's docstring says."""
    return all((folder / part).is_dir() for part in ("vae", "unet", "text_encoder"))


def load_stable_diffusion(
    source: str | Path,
    *,
    msi: Path,
    recognizer: Path | Sequence[Path],
    vision: Path | None = None,
    msi_input: MSIInput = "rgb",
    recognizer_input: str = "auto",
    lora: Sequence[tuple[Path, float]] = (),
    few_lora: tuple[Path, float] | None = None,
    tokenizer: Path | None = None,
    revision: str | None = None,
    cache: Path | None = None,
    guide_decoder: Path | None = None,
    parser: Path | None = None,
) -> Components:
    """Load a model of the Stable Diffusion 1.x family.

    Args:
        source: A diffusers folder, a repository of the hub in that layout (`owner/name`), or one
            file in the original layout.
        msi: MSI weights.
        recognizer: A recognizer's file, or several: an ensemble.
        vision: CLIP vision tower; by default `image_encoder` of the source.
        msi_input: See `VisionEmbedder`.
        recognizer_input: `input_format` of `load_recognizer`.
        lora: Adapters and their scales, fused in this order.
        few_lora: Adapter of the UNet, and its scale, that makes it a few-step model (LCM-LoRA,
            TCD-LoRA, Hyper-SD): for the optional program `denoise_few`, `denoise` stays without.
        tokenizer: Folder with `vocab.json`; by default the source's own, or CLIP's where a single
            file has CLIP's vocabulary.
        revision: Of a repository of the hub.
        cache: Of the hub; by default the hub library's own.
        parser: Weights of a face parser, for the optional program `parse`.
        guide_decoder: diffusers folder of an `AutoencoderTiny` that `guide` shall go through.

    Raises:
        OptionError: Parts or tensors are missing, unexpected or do not fit; all are named.
    """
    recognizers = [recognizer] if isinstance(recognizer, Path) else list(recognizer)
    named = [
        msi,
        *recognizers,
        *(p for p in (vision, tokenizer, guide_decoder, parser) if p),
        *(file for file, _ in (*lora, *([few_lora] if few_lora else []))),
    ]
    folder = Path(source)
    if folder.is_dir():
        named += [folder / part for part in ("vae", "unet", "text_encoder")]
        named += [] if tokenizer else [folder / "tokenizer"]
        named += [] if vision else [folder / "image_encoder"]
    missing = [str(path) for path in named if not path.exists()]
    if missing:
        raise OptionError(f"missing for a Stable Diffusion export: {', '.join(missing)}")
    networks = _networks(source, vision, tokenizer, revision, cache)
    loaded = load_recognizer(recognizers, input_format=recognizer_input)
    provenance = {**networks.provenance, **loaded.provenance}
    for index, (file, scale) in enumerate(lora, 1):
        (stated,) = fuse_lora(networks.unet, networks.text, file, scale).values()
        provenance[f"lora_{index}"] = stated
    few: DiffusersUNet | None = None
    if few_lora is not None:
        distilled = copy.deepcopy(networks.unet)
        (provenance["few_lora"],) = fuse_lora(distilled, nn.Module(), *few_lora).values()
        few = DiffusersUNet(distilled.eval().requires_grad_(False))
    components = assemble(
        name=networks.name,
        vae=networks.vae,
        unet=networks.unet,
        text=networks.text,
        vision=networks.vision,
        vocabulary=networks.vocabulary,
        msi_state=read_msi(msi),
        recognizer=loaded.module,
        msi_input=msi_input,
        schedule=networks.schedule,
        provenance=provenance,
    )
    components = replace(components, few=few)
    if parser is not None:
        components = replace(
            components,
            parser=load_parser(parser, components.dimensions.image_size),
            provenance={**components.provenance, "parser": parser.name},
        )
    if guide_decoder is None:
        return components
    d = components.dimensions
    latent = torch.zeros(1, d.latent_channels, d.latent_size, d.latent_size)
    return replace(
        components,
        guide_decoder=load_tiny_decoder(guide_decoder, components.autoencoder, latent),
        provenance={**components.provenance, "guide_decoder": guide_decoder.name},
    )


@dataclass(frozen=True)
class _Networks:
    """What a source gave, before MSI and recognizer join it."""

    name: str
    vae: Any
    unet: Any
    text: Any
    vision: Any
    vocabulary: Mapping[str, int]
    schedule: NoiseSchedule
    provenance: Mapping[str, str]


def _networks(
    source: str | Path,
    vision: Path | None,
    tokenizer: Path | None,
    revision: str | None,
    cache: Path | None,
) -> _Networks:
    import diffusers
    import transformers

    vision_class: Any = transformers.CLIPVisionModel

    def tower(repository: Repository | None) -> Any:
        if vision is not None:
            local = Repository(str(vision), {"local_files_only": True})
            return local.load(vision_class, "", partly=True).float()
        if repository is None:
            raise OptionError(f"'{source}' is a single file without a vision tower: give --vision")
        return repository.load(vision_class, "image_encoder").float()

    if is_single_file(Path(source)):
        file = Path(source)
        own_tower = tower(None)
        parts = read_single_file(file)
        if tokenizer is None and parts.text.config.vocab_size != _CLIP_ROWS:
            raise OptionError(
                f"'{source}' has a vocabulary of {parts.text.config.vocab_size} tokens, not CLIP's "
                f"{_CLIP_ROWS}: give --tokenizer, a folder with vocab.json"
            )
        vocabulary = CLIP_VOCABULARY if tokenizer is None else _vocabulary(tokenizer / _VOCABULARY)
        return _Networks(
            name=file.stem,
            vae=parts.vae,
            unet=parts.unet,
            text=parts.text,
            vision=own_tower,
            vocabulary=vocabulary,
            schedule=NoiseSchedule(),
            provenance={"source": f"{file.name}, original layout"},
        )
    repository = Repository(str(source), {"local_files_only": True})
    provenance = {}
    if not Path(source).is_dir():
        repository = open_hub(str(source), revision=revision, cache=cache)
        provenance = {"source": f"{source}, commit {repository.commit}"}
    words = repository.file(f"tokenizer/{_VOCABULARY}")
    if tokenizer is not None:
        words = tokenizer / _VOCABULARY
    if words is None:
        raise OptionError(f"'{source}' has no tokenizer/{_VOCABULARY}: give --tokenizer")
    # These packages' classes carry no types.
    vae_class: Any = diffusers.AutoencoderKL
    unet_class: Any = diffusers.UNet2DConditionModel
    text_class: Any = transformers.CLIPTextModel
    exact: dict[str, Any] = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    return _Networks(
        name=Path(source).name,
        vae=repository.load(vae_class, "vae", **exact),
        unet=repository.load(unet_class, "unet", **exact),
        text=repository.load(text_class, "text_encoder").float(),
        vision=tower(repository),
        vocabulary=_vocabulary(words),
        schedule=_schedule(repository.file("scheduler/scheduler_config.json")),
        provenance=provenance,
    )


def _vocabulary(file: Path) -> dict[str, int]:
    try:
        words: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"'{file}' cannot be read as a vocabulary: {error}") from error
    return words


def _prompts(vocabulary: Mapping[str, int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers [T] of the prompt "*" and of the empty prompt, padded with the end token."""
    try:
        start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
        star = vocabulary["*</w>"]
    except KeyError as error:
        raise OptionError(f"the tokenizer's vocabulary lacks {error}") from error
    prompt = [start, star, *[end] * (length - 2)]
    empty = [start, *[end] * (length - 1)]
    return torch.tensor(prompt), torch.tensor(empty)


def _schedule(file: Path | None) -> NoiseSchedule:
    """The schedule that the source states; SD 1.x's where it states none."""
    if file is None:
        return NoiseSchedule()
    config = json.loads(file.read_text(encoding="utf-8"))
    expected = {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
    wrong = [
        f"{key}: received {config[key]!r}, expected {value!r}"
        for key, value in expected.items()
        if key in config and config[key] != value
    ]
    if wrong:
        raise OptionError(f"'{file}': " + "; ".join(wrong))
    return NoiseSchedule(
        steps=int(config.get("num_train_timesteps", 1000)),
        beta_start=float(config.get("beta_start", 0.00085)),
        beta_end=float(config.get("beta_end", 0.012)),
    )
