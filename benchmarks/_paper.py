"""The published recipe in PyTorch: by our oracle, and by diffusers' scheduler, eager or compiled.

He et al., "Diff-Privacy: Diffusion-based Face Privacy Protection", arXiv 2309.05330. Both make the
same 30 guided DDIM steps from the same noise on the same weights; a test holds them together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray

from diffveil.bundle import Bundle
from diffveil_export.components import Components
from diffveil_export.energy import identity_energy
from diffveil_export.models.embedded import load_embedded
from diffveil_export.oracle import ANONYMIZE, Recipe, anonymize, invert

__all__ = ["DiffusersRecipe", "PaperCase"]

_RELEASED_VARIANTS = 4
_RELEASED_INVERSION = 50


class DiffusersRecipe:
    """The recipe as one writes it with diffusers: its DDIM, and guidance by autograd.

    Args:
        components: The model.
        recipe: Steps, weights and thresholds; its mode repels.
        compiled: Whether `torch.compile` compiles the UNet and the energy with its gradient.
    """

    def __init__(
        self, components: Components, recipe: Recipe = ANONYMIZE, *, compiled: bool = False
    ) -> None:
        self._components, self._recipe = components, recipe
        self._unet: Any = components.unet
        self._energy_of: Any = self._energy
        if compiled:
            self._unet = torch.compile(self._unet)
            self._energy_of = torch.compile(self._energy_of)
        s = components.schedule
        scheduler: Any = DDIMScheduler
        self._scheduler = scheduler(
            num_train_timesteps=s.steps,
            beta_start=s.beta_start,
            beta_end=s.beta_end,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        )

    @torch.no_grad()
    def anonymize(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """One variant [N, 3, S, S] of photos [N, 3, S, S], from noise [N, C, s, s]."""
        parts, recipe, scheduler = self._components, self._recipe, self._scheduler
        scheduler.set_timesteps(recipe.steps)
        count = int(recipe.steps * recipe.strength + 1e-9)
        timesteps = scheduler.timesteps[recipe.steps - count :]
        start = scheduler.timesteps[max(recipe.steps - count - 1, 0)]
        identity, tokens = parts.recognizer(image), parts.embedder(image)
        latent = scheduler.add_noise(
            parts.autoencoder.encode(image), noise, start.expand(len(image))
        )
        for t in timesteps.tolist():
            if t > recipe.conditional_above:
                conditioning = parts.expander(tokens[:, t * 10 // 1000])
            else:
                conditioning = parts.unconditional.expand(len(image), -1, -1)
            epsilon = self._unet(latent, torch.full((len(image),), t), conditioning)
            step = scheduler.step(epsilon, t, latent)
            with torch.enable_grad():
                x0 = step.pred_original_sample.detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(self._energy_of(x0, identity), x0)
            weight = next((w for above, w in recipe.weights if t > above), 0.0)
            latent = step.prev_sample - weight * gradient
        return parts.autoencoder.decode(latent).clamp(-1, 1)

    def _energy(self, x0: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
        on = x0.new_ones(len(x0))
        embedding = self._components.recognizer(self._components.autoencoder.decode(x0))
        apart = x0.new_zeros(len(x0), len(x0))
        return identity_energy(embedding, identity, on, 0 * on, apart).sum()


class PaperCase:
    """One face under the published recipe in PyTorch.

    Args:
        bundle: The weights; of the reference family.
        crop: The face, uint8 [S, S, 3].
    """

    def __init__(self, bundle: Bundle, crop: NDArray[np.uint8]) -> None:
        # The published gradient goes through the whole decoder, whatever this bundle's guide does.
        self.components = replace(load_embedded(bundle), guide_decoder=None)
        self.image = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        d = self.components.dimensions
        shape = (1, _RELEASED_VARIANTS, d.latent_channels, d.latent_size, d.latent_size)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def one(self) -> torch.Tensor:
        """One variant and no key: [1, 1, 3, S, S]."""
        return anonymize(self.components, self.image, self.noise[:, :1])

    def released(self) -> torch.Tensor:
        """As it was released: four variants, and their key by 50 steps of inversion."""
        invert(self.components, self.image, steps=_RELEASED_INVERSION)
        return anonymize(self.components, self.image, self.noise)

    def diffusers(self, *, compiled: bool) -> DiffusersRecipe:
        """The same model through diffusers."""
        return DiffusersRecipe(self.components, compiled=compiled)
