"""The oracle's loop against diffusers' schedulers, and what its operations promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import nn

from diffveil_export import oracle
from diffveil_export.components import Components
from tiny_models import tiny_components

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


@pytest.fixture(scope="module")
def components() -> Components:
    return tiny_components()


@pytest.fixture
def image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def test_unguided_protection_is_diffusers_ddim(
    components: Components, image: torch.Tensor, noise: torch.Tensor
) -> None:
    recipe = replace(oracle.ANONYMIZE, steps=10, weights=((-1, 0.0),), conditional_above=400)
    actual = oracle.protect(components, image, noise, recipe)

    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps.tolist()  # 901, 801, … 1
    photo = components.autoencoder.encode(image).repeat_interleave(3, 0)
    z = scheduler.add_noise(photo, noise.flatten(0, 1), torch.tensor([601] * 6))
    tokens = components.embedder(image)
    for t in timesteps[-6:]:
        if t > 400:
            conditioning = components.expander(tokens[:, t // 100]).repeat_interleave(3, 0)
        else:
            conditioning = components.unconditional.expand(6, -1, -1)
        epsilon = components.unet(z, torch.tensor([t] * 6), conditioning)
        z = scheduler.step(epsilon, t, z).prev_sample
    expected = components.autoencoder.decode(z).clamp(-1, 1).unflatten(0, (2, 3))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_inversion_is_diffusers_ddim_inverse(components: Components, image: torch.Tensor) -> None:
    tokens, z = oracle.invert(components, image, steps=10)
    scheduler = DDIMInverseScheduler(**SCHEDULE)
    scheduler.set_timesteps(10)
    expected = components.autoencoder.encode(image)
    for t in scheduler.timesteps.tolist():
        conditioning = components.expander(tokens[:, t // 100])
        epsilon = components.unet(expected, torch.tensor([t, t]), conditioning)
        expected = scheduler.step(epsilon, t, expected).prev_sample
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


class _GaussianDenoiser(nn.Module):
    """The exact ε-predictor of latents that are normal with variance v: ε = σ z / (α²v + σ²)."""

    def __init__(self, variance: float) -> None:
        super().__init__()
        self.variance = variance
        schedule = DDIMScheduler(**SCHEDULE)
        self.alpha_bar = schedule.alphas_cumprod

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, _: object) -> torch.Tensor:
        signal = self.alpha_bar[timestep].reshape(-1, 1, 1, 1)
        return (1 - signal).sqrt() * latent / (signal * self.variance + 1 - signal)


@torch.no_grad()
def test_recovery_returns_to_the_photo(components: Components, image: torch.Tensor) -> None:
    """DDIM inversion is approximate, and the better the more steps are made."""
    components = replace(components, unet=_GaussianDenoiser(0.25))
    reference = components.autoencoder.decode(components.autoencoder.encode(image)).clamp(-1, 1)
    errors = []
    for steps in (5, 50):
        tokens, z = oracle.invert(components, image, steps=steps)
        recovered = oracle.recover(components, tokens, z, steps=steps)
        errors.append(float((recovered - reference).square().mean()))
    assert errors[1] < errors[0] / 20


@pytest.mark.parametrize("mode", ["attract", "repel"])
def test_guidance_moves_identity_the_way_it_should(
    mode: Literal["attract", "repel"],
    components: Components,
    image: torch.Tensor,
    noise: torch.Tensor,
) -> None:
    identity = components.recognizer(image).repeat_interleave(3, 0)

    def distance(weight: float) -> float:
        recipe = replace(oracle.HIDE, steps=10, weights=((-1, weight),), mode=mode)
        faces = oracle.protect(components, image, noise, recipe)
        return float((1 - (components.recognizer(faces.flatten(0, 1)) * identity).sum(1)).mean())

    # A random recognizer hardly tells faces apart, so the pull must be strong to show.
    ratio = distance(300.0) / distance(0.0)
    assert ratio < 0.8 if mode == "attract" else ratio > 1.25


def test_faces_do_not_influence_each_other(
    components: Components, image: torch.Tensor, noise: torch.Tensor
) -> None:
    recipe = replace(oracle.ANONYMIZE, steps=5)
    both = oracle.protect(components, image, noise, recipe)
    one = oracle.protect(components, image[1:], noise[1:], recipe)
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-4)


def test_background_is_kept_below_its_timestep(
    components: Components, image: torch.Tensor, noise: torch.Tensor
) -> None:
    """With nothing masked as face, the last steps leave the photo's own latent."""
    recipe = replace(oracle.ANONYMIZE, steps=10)
    nothing = torch.zeros(4, 4)
    result = oracle.anonymize(components, image, noise, recipe, face_mask=nothing)
    with torch.no_grad():
        photo = components.autoencoder.decode(components.autoencoder.encode(image)).clamp(-1, 1)
    torch.testing.assert_close(result, photo[:, None].expand_as(result))
