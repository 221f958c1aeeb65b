"""A recognizer that reads latents: what `guide_latent` has in place of decoder and recognizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffveil.errors import OptionError

__all__ = ["LatentRecognizer"]

_FLOOR = 4  # side of the last feature map; a latent is halved until it is at most this large


class _Convolution(nn.Module):
    """3×3 convolution and batch normalisation, which folds into it for export."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.conv(x))
        return y

    def fuse(self) -> None:
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _Convolution(width, width)
        self.second = _Convolution(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x + self.second(nn.functional.silu(self.first(x))))


class LatentRecognizer(nn.Module):
    """Scaled latents to the unit embeddings that the recognizer gives their decoded photos.

    Smooth activations everywhere: only its gradient matters in the end.

    Args:
        channels: Channels C of a latent.
        size: Side s of a latent.
        embedding: Width E of an embedding.
        width: Channels at the latent's own resolution; doubled at each halving, up to four times.
        blocks: Residual blocks at each resolution.
    """

    def __init__(
        self, channels: int, size: int, embedding: int, width: int = 64, blocks: int = 2
    ) -> None:
        super().__init__()
        self.origin = ""  # what it was trained on and how well it did, in words
        self.config = {
            "channels": channels,
            "size": size,
            "embedding": embedding,
            "width": width,
            "blocks": blocks,
        }
        layers: list[nn.Module] = [_Convolution(channels, width), nn.SiLU()]
        now, side = width, size
        layers.extend(_Block(now) for _ in range(blocks))
        while side > _FLOOR:
            wider = min(2 * now, 4 * width)
            layers += [_Convolution(now, wider, 2), nn.SiLU()]
            layers.extend(_Block(wider) for _ in range(blocks))
            now, side = wider, (side + 1) // 2
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(now * side * side, embedding)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, E], L2-normalised, of latents [B, C, s, s]."""
        return nn.functional.normalize(self.head(self.features(latent).flatten(1)), dim=-1)

    def fuse(self) -> LatentRecognizer:
        """Fold every batch normalisation into its convolution, in place; for inference only."""
        self.eval()
        for module in self.modules():
            if isinstance(module, _Convolution):
                module.fuse()
        return self

    def save(self, file: Path) -> None:
        """Write weights and constructor arguments as one safetensors file."""
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        notes = {"latent_recognizer": json.dumps(self.config), "origin": self.origin}
        partial = file.with_suffix(".partial")
        save_file(state, partial, metadata=notes)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> LatentRecognizer:
        """Read what `save` wrote.

        Raises:
            OptionError: The file is none, or its tensors do not fit its arguments.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                notes = opened.metadata()
                config: dict[str, Any] = json.loads(notes["latent_recognizer"])
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            network = cls(**config)
            network.load_state_dict(state)
            network.origin = notes.get("origin", "")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"'{file}' is no latent recognizer as `diffveil distill-guide` keeps it: {error}"
            ) from error
        return network
