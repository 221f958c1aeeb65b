"""The networks of a model, whatever family they come from, as the exporter and the oracle see them.

A loader in `diffveil_export.models` turns a source folder into `Components`; everything after it
knows only the calls declared here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffveil.programs import ALL_PROGRAMS, JOINED_LATER, STAGES, Dimensions, ProgramSpec
from diffveil.schedule import NoiseSchedule

__all__ = [
    "ARCFACE_TEMPLATE",
    "Autoencoder",
    "Components",
    "Decoder",
    "Denoiser",
    "Embedder",
    "Expander",
    "Parser",
    "Recognizer",
    "arcface_template",
    "measure_dimensions",
]

ARCFACE_TEMPLATE: tuple[tuple[float, float], ...] = (
    (38.29, 51.70),
    (73.53, 51.50),
    (56.03, 71.74),
    (41.55, 92.37),
    (70.73, 92.20),
)
"""Eyes, nose and mouth corners, (x, y) in pixels of a 112×112 crop (Deng et al. 2019, ArcFace)."""


def arcface_template(
    image_size: int, left: float, top: float, framing: float
) -> tuple[tuple[float, float], ...]:
    """ArcFace's landmarks in an S×S crop, an inner square of which is ArcFace's framing.

    Args:
        image_size: Side S of the crop in pixels.
        left: Distance in pixels from the crop's left border to the framing.
        top: Distance in pixels from the crop's top border to the framing.
        framing: Side of the framing in pixels.

    Raises:
        ValueError: The framing does not lie inside the crop.
    """
    if min(left, top) < 0 or framing <= 0 or max(left, top) + framing > image_size:
        raise ValueError(f"framing {framing} at ({left}, {top}) is not inside {image_size} pixels")
    scale = framing / 112
    return tuple((left + x * scale, top + y * scale) for x, y in ARCFACE_TEMPLATE)


class Autoencoder(Protocol):
    """Images to scaled latents and back."""

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Scaled latent mean [B, C, s, s] of images [B, 3, S, S] in [-1, 1]."""
        ...

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, S, S] of scaled latents [B, C, s, s]."""
        ...


class Decoder(Protocol):
    """The half of an autoencoder that `guide` goes through."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, S, S] of scaled latents [B, C, s, s]."""
        ...


class Denoiser(Protocol):
    """The diffusion model."""

    def __call__(
        self, latent: torch.Tensor, timestep: torch.Tensor, conditioning: torch.Tensor
    ) -> torch.Tensor:
        """Noise in latents [B, C, s, s] at timesteps [B] (int64), given [B, T, W]."""
        ...


class Embedder(Protocol):
    """Vision tower and MSI."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Stage tokens [B, 10, D] of images [B, 3, S, S] in [-1, 1]."""
        ...


class Expander(Protocol):
    """Text encoder with its placeholder replaced."""

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Conditioning [N, T, W] of tokens [N, D]."""
        ...


class Parser(Protocol):
    """Face parser, its resizing included."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Probability of being the face [B, 1, S, S] of images [B, 3, S, S] in [-1, 1]."""
        ...


class Recognizer(Protocol):
    """Face recognizer, its crop and resize included."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Unit embeddings [B, E] of images [B, 3, S, S] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Components:
    """A model's networks, frozen and in evaluation mode, with the facts that its bundle states.

    Attributes:
        name: Name of the model.
        autoencoder: Also a `torch.nn.Module`, as are the four after it.
        unet: ε-predicting diffusion model.
        embedder: Image to stage tokens.
        expander: Token to conditioning.
        recognizer: Image to identity embedding.
        unconditional: Conditioning of the empty prompt, [1, T, W] float32.
        dimensions: Sizes of all axes.
        schedule: Noise schedule that `unet` was trained with.
        template: Five landmarks in a crop, (x, y) in pixels.
        thresholds: Cosine thresholds of the recognizer by false accept rate.
        licence: Licence of the weights.
        provenance: Where the weights come from, by topic.
        source: Constructor arguments of each network, for families that `models.embedded` can
            rebuild from a bundle; empty otherwise.
        parser: Image to where the face is; None for a bundle without `parse`.
        few: `unet` distilled for a handful of steps; None for a bundle without `denoise_few`.
        guide_decoder: What `guide` decodes with instead of `autoencoder`; None for that.
        card: Text of the model card that travels in the bundle; empty if there is none.
    """

    name: str
    autoencoder: Autoencoder
    unet: Denoiser
    embedder: Embedder
    expander: Expander
    recognizer: Recognizer
    unconditional: torch.Tensor
    dimensions: Dimensions
    template: tuple[tuple[float, float], ...]
    licence: str
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    guide_decoder: Decoder | None = None
    parser: Parser | None = None
    few: Denoiser | None = None
    card: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for module in self.modules().values():
            module.eval().requires_grad_(False)

    def modules(self) -> dict[str, nn.Module]:
        """The networks by field name."""
        parts: dict[str, object] = {
            "autoencoder": self.autoencoder,
            "unet": self.unet,
            "embedder": self.embedder,
            "expander": self.expander,
            "recognizer": self.recognizer,
        }
        if self.guide_decoder is not None:
            parts["guide_decoder"] = self.guide_decoder
        if self.parser is not None:
            parts["parser"] = self.parser
        if self.few is not None:
            parts["few"] = self.few
        return {name: cast(nn.Module, part) for name, part in parts.items()}

    @property
    def programs(self) -> tuple[ProgramSpec, ...]:
        """The programs that a bundle of this model holds, in the order of their export."""
        optional = {"parse": self.parser, "denoise_few": self.few, **dict.fromkeys(JOINED_LATER)}
        return tuple(s for s in ALL_PROGRAMS.values() if optional.get(s.name, s) is not None)

    @property
    def guide_parts(self) -> tuple[Decoder, Recognizer]:
        """What `guide` goes through: a decoder, then the recognizer."""
        return self.guide_decoder or self.autoencoder, self.recognizer

    def to(self, dtype: torch.dtype) -> Components:
        """The same model in another floating-point type; the networks are changed in place."""
        for module in self.modules().values():
            module.to(dtype)
        return replace(self, unconditional=self.unconditional.to(dtype))


@torch.no_grad()
def measure_dimensions(
    image_size: int,
    autoencoder: Autoencoder,
    embedder: Embedder,
    expander: Expander,
    recognizer: Recognizer,
) -> Dimensions:
    """Find the sizes of all axes by running every network but the diffusion model once.

    Nothing is computed: tensors are fakes, so a full-size model takes no longer than a small one.

    Args:
        image_size: Side S of a crop in pixels.
        autoencoder: As in `Components`, and the other networks too, in evaluation mode.
        embedder: See `Components`.
        expander: See `Components`.
        recognizer: See `Components`.

    Raises:
        ValueError: A network returns a tensor whose shape cannot be what its program returns.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.zeros(1, 3, image_size, image_size)
        latent = autoencoder.encode(image)
        tokens = embedder(image)
        conditioning = expander(tokens[:, 0])
        embedding = recognizer(image)
        decoded = autoencoder.decode(latent)
    shapes = {
        "latent": (latent.ndim == 4 and latent.shape[2] == latent.shape[3], latent),
        "tokens": (tokens.ndim == 3 and tokens.shape[1] == STAGES, tokens),
        "conditioning": (conditioning.ndim == 3, conditioning),
        "embedding": (embedding.ndim == 2, embedding),
        "decoded image": (decoded.shape == image.shape, decoded),
    }
    wrong = [f"{name} {list(t.shape)}" for name, (ok, t) in shapes.items() if not ok]
    if wrong:
        raise ValueError(f"unexpected shapes for a {image_size}-pixel crop: {', '.join(wrong)}")
    return Dimensions(
        image_size=image_size,
        latent_channels=latent.shape[1],
        latent_size=latent.shape[2],
        token_width=tokens.shape[2],
        conditioning_length=conditioning.shape[1],
        conditioning_width=conditioning.shape[2],
        embedding_width=embedding.shape[1],
    )
