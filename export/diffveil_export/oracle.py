"""The published method in plain PyTorch: what every faster path is compared with.

He et al., "Diff-Privacy: Diffusion-based Face Privacy Protection", arXiv 2309.05330. Networks are
called directly, gradients come from autograd, sampler steps are written out, and nothing of the
runtime's samplers or loops is used. Slow, and meant to be read.

Symbols: z_t a latent at timestep t, ᾱ_t the share of signal left, ε the predicted noise, x̂0 the
predicted clean latent; key-E a photo's ten stage tokens, key-I its noise map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from diffveil_export.components import Components
from diffveil_export.energy import identity_energy

__all__ = ["ANONYMIZE", "HIDE", "Recipe", "anonymize", "hide", "invert", "protect", "recover"]


@dataclass(frozen=True)
class Recipe:
    """Numbers of one protecting operation.

    Attributes:
        steps: Steps of the whole schedule.
        strength: Share of them that is made.
        conditional_above: The photo's conditioning holds at timesteps above, the empty prompt's
            at and below.
        weights: Pairs of a timestep and the guidance weight above it, highest first.
        mode: Away from the photo's identity, or towards it.
        background_below: The background is reset to the photo's latent at timesteps below.
    """

    steps: int
    strength: float
    conditional_above: int
    weights: tuple[tuple[int, float], ...]
    mode: Literal["repel", "attract"]
    background_below: int = 0


ANONYMIZE = Recipe(50, 0.6, 400, ((-1, 1.0),), "repel", background_below=300)
HIDE = Recipe(100, 0.8, 600, ((600, 1.5), (-1, 2.5)), "attract")


def anonymize(
    components: Components,
    image: torch.Tensor,
    noise: torch.Tensor,
    recipe: Recipe = ANONYMIZE,
    face_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Faces unlike the photo's and unlike each other; arguments and result as in `protect`."""
    return protect(components, image, noise, recipe, face_mask)


def hide(
    components: Components, image: torch.Tensor, noise: torch.Tensor, recipe: Recipe = HIDE
) -> torch.Tensor:
    """Faces that look different but have the photo's embedding; as in `protect`."""
    return protect(components, image, noise, recipe)


@torch.no_grad()
def protect(
    components: Components,
    image: torch.Tensor,
    noise: torch.Tensor,
    recipe: Recipe,
    face_mask: torch.Tensor | None = None,
    others: torch.Tensor | None = None,
) -> torch.Tensor:
    """Partly noise photos' latents and denoise them, steered by the identity energy.

    Args:
        components: The model.
        image: Photos [N, 3, S, S] in [-1, 1].
        noise: Unit normal noise [N, V, C, s, s] that the V variants of each photo start from.
        recipe: Steps, weights and thresholds.
        face_mask: [s, s] in [0, 1], 1 on the face; outside it, latents below
            `recipe.background_below` are the photo's. None keeps nothing.
        others: Stage tokens [N·V, 10, D] that take the place of the empty prompt; None for that,
            as published.

    Returns:
        Images [N, V, 3, S, S], clipped to [-1, 1].
    """
    variants = noise.shape[1]
    alpha_bar = _alpha_bar(components)
    timesteps = _timesteps(recipe.steps)
    count = int(recipe.steps * recipe.strength + 1e-9)
    photo = components.autoencoder.encode(image).repeat_interleave(variants, 0)
    identity = components.recognizer(image).repeat_interleave(variants, 0)
    tokens = components.embedder(image)

    # Pairs of one photo's variants must differ from each other.
    owner = torch.arange(len(photo)) // variants
    sibling = (owner[:, None] == owner[None, :]).to(photo.dtype) * float(recipe.mode == "repel")
    on = torch.ones(len(photo), dtype=photo.dtype)
    repel, attract = (on, on * 0) if recipe.mode == "repel" else (on * 0, on)

    # Noise to DDIM index `count`, denoise from index count - 1: as the method does.
    start = alpha_bar[timesteps[min(count, recipe.steps - 1)]]
    z = start**0.5 * photo + (1 - start) ** 0.5 * noise.flatten(0, 1)
    for index in reversed(range(count)):
        t = timesteps[index]
        here = alpha_bar[t]
        there = alpha_bar[timesteps[index - 1]] if index else alpha_bar[0]
        if t > recipe.conditional_above:
            conditioning = _conditioning(components, tokens, t, variants)
        elif others is not None:
            conditioning = _conditioning(components, others, t, 1)
        else:
            conditioning = components.unconditional.expand(len(z), -1, -1)
        epsilon = components.unet(z, torch.full((len(z),), t), conditioning)
        x0 = (z - (1 - here) ** 0.5 * epsilon) / here**0.5
        # DDIM, arXiv 2010.02502, equation 12 with η = 0.
        z = there**0.5 * x0 + (1 - there) ** 0.5 * epsilon
        weight = next((w for above, w in recipe.weights if t > above), 0.0)
        gradient = _energy_gradient(components, x0, identity, repel, attract, sibling)
        z = z - weight * gradient
        if face_mask is not None and t < recipe.background_below:
            z = face_mask * z + (1 - face_mask) * photo
    result = components.autoencoder.decode(z).clamp(-1, 1)
    return result.reshape(-1, variants, *result.shape[1:])


@torch.no_grad()
def invert(
    components: Components, image: torch.Tensor, steps: int = 100
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recovery key of photos by DDIM inversion.

    Args:
        components: The model.
        image: Photos [N, 3, S, S] in [-1, 1].
        steps: Steps of inversion.

    Returns:
        key-E [N, 10, D] and key-I [N, C, s, s].
    """
    alpha_bar = _alpha_bar(components)
    tokens = components.embedder(image)
    z = components.autoencoder.encode(image)
    here = alpha_bar[0]
    for t in _timesteps(steps):
        there = alpha_bar[t]
        conditioning = _conditioning(components, tokens, t, 1)
        epsilon = components.unet(z, torch.full((len(z),), t), conditioning)
        x0 = (z - (1 - here) ** 0.5 * epsilon) / here**0.5
        z = there**0.5 * x0 + (1 - there) ** 0.5 * epsilon
        here = there
    return tokens, z


@torch.no_grad()
def recover(
    components: Components, tokens: torch.Tensor, noise_map: torch.Tensor, steps: int = 100
) -> torch.Tensor:
    """Photos from their recovery keys, by DDIM.

    Args:
        components: The model.
        tokens: key-E [N, 10, D].
        noise_map: key-I [N, C, s, s].
        steps: Steps that the key was made with.

    Returns:
        Images [N, 3, S, S], clipped to [-1, 1].
    """
    alpha_bar = _alpha_bar(components)
    timesteps = _timesteps(steps)
    z = noise_map
    for index in reversed(range(steps)):
        t = timesteps[index]
        here = alpha_bar[t]
        there = alpha_bar[timesteps[index - 1]] if index else alpha_bar[0]
        conditioning = _conditioning(components, tokens, t, 1)
        epsilon = components.unet(z, torch.full((len(z),), t), conditioning)
        x0 = (z - (1 - here) ** 0.5 * epsilon) / here**0.5
        z = there**0.5 * x0 + (1 - there) ** 0.5 * epsilon
    return components.autoencoder.decode(z).clamp(-1, 1)


def _alpha_bar(components: Components) -> list[float]:
    """ᾱ of every timestep: β linear in its root (Rombach et al., arXiv 2112.10752)."""
    s = components.schedule
    root = torch.linspace(s.beta_start**0.5, s.beta_end**0.5, s.steps, dtype=torch.float64)
    values: list[float] = (1 - root**2).cumprod(0).tolist()
    return values


def _timesteps(steps: int) -> list[int]:
    """1, 1 + 1000/S, …: uniform spacing with offset 1."""
    return [1 + i * (1000 // steps) for i in range(steps)]


def _conditioning(
    components: Components, tokens: torch.Tensor, timestep: int, variants: int
) -> torch.Tensor:
    """Conditioning [N·V, T, W] of the stage that `timestep` lies in."""
    expanded = components.expander(tokens[:, timestep * 10 // 1000])
    return expanded.repeat_interleave(variants, 0)


def _energy_gradient(
    components: Components,
    x0: torch.Tensor,
    identity: torch.Tensor,
    repel: torch.Tensor,
    attract: torch.Tensor,
    sibling: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the identity energy by x̂0 [B, C, s, s], through decoder and recognizer."""
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_(True)
        embedding = components.recognizer(components.autoencoder.decode(x0))
        energy = identity_energy(embedding, identity, repel, attract, sibling).sum()
        (gradient,) = torch.autograd.grad(energy, x0)
    return gradient
