"""Wrote `bundle-v1`, once. The folder stays as it is: readers of all later versions must load it.

    python tests/data/make_bundle_v1.py

Its networks are the smallest that have every program's tensors: a few linear maps.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from diffveil_export.components import ARCFACE_TEMPLATE, Components, measure_dimensions
from diffveil_export.exporter import export_bundle

SIZE, TOKEN, LENGTH = 16, 6, 3


class LinearAutoencoder(nn.Module):
    """Every 4×4 patch through one matrix, and back through another."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 4, stride=4)
        self.up = nn.Conv2d(4, 48, 1)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = self.down(image)
        return latent

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.up(latent), 4).tanh()


class Denoiser(nn.Module):
    """Mixes latent, time and conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.listen = nn.Linear(TOKEN, 4)

    def forward(
        self, latent: torch.Tensor, timestep: torch.Tensor, conditioning: torch.Tensor
    ) -> torch.Tensor:
        shift = self.listen(conditioning.mean(1)) + (timestep / 1000)[:, None]
        mixed: torch.Tensor = self.mix(latent) + shift[:, :, None, None]
        return mixed


class Embedder(nn.Module):
    """Ten tokens from the mean colours of a photo's quarters."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(12, 10 * TOKEN)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        quarters = image.reshape(-1, 3, 2, SIZE // 2, 2, SIZE // 2).mean((3, 5)).flatten(1)
        tokens: torch.Tensor = self.project(quarters).reshape(-1, 10, TOKEN)
        return tokens


class Expander(nn.Module):
    """A token to a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(TOKEN, LENGTH * TOKEN)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        sequence: torch.Tensor = self.project(tokens).reshape(-1, LENGTH, TOKEN)
        return sequence


class Recognizer(nn.Module):
    """A unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 5, 4, stride=4)
        self.project = nn.Linear(5 * 16, 7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.features(image).sigmoid().flatten(1)
        return F.normalize(self.project(features), dim=1)


def main() -> None:
    """Export the networks."""
    torch.manual_seed(1)
    parts = LinearAutoencoder(), Embedder(), Expander(), Recognizer()
    for part in parts:
        part.eval().requires_grad_(False)
    autoencoder, embedder, expander, recognizer = parts
    components = Components(
        name="bundle-v1",
        autoencoder=autoencoder,
        unet=Denoiser(),
        embedder=embedder,
        expander=expander,
        recognizer=recognizer,
        unconditional=torch.randn(1, LENGTH, TOKEN),
        dimensions=measure_dimensions(SIZE, autoencoder, embedder, expander, recognizer),
        template=tuple((x * SIZE / 112, y * SIZE / 112) for x, y in ARCFACE_TEMPLATE),
        licence="CC0-1.0: random weights",
        thresholds={"far_1e-2": 0.3},
        provenance={"made_by": "tests/data/make_bundle_v1.py"},
    )
    export_bundle(components, Path(__file__).parent / "bundle-v1", weights="float32")


if __name__ == "__main__":
    main()
