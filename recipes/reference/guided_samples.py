"""anonymize and hide as the runtime runs them, with networks that are still in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import mixed_precision
from train_diffusion import Diffusion

from diffveil.engines import Programs
from diffveil.fused import Background
from diffveil.guidance import IdentityGuidance
from diffveil.masks import face_mask, fitted_mask, latent_mask
from diffveil.noise import NoiseKey
from diffveil.plans import Plan
from diffveil.samplers import SamplerTable, Step
from diffveil.sampling import add_noise, run
from diffveil.surrogates import Surrogates


@dataclass(frozen=True)
class Faces:
    """A batch on its way: everything that stays the same over the steps."""

    image: torch.Tensor  # [B, 3, S, S] in [-1, 1]
    latent: torch.Tensor  # [B, C, s, s]
    tokens: torch.Tensor  # [B, 10, D]
    identities: torch.Tensor  # [B, E]
    surrogates: torch.Tensor  # [B, 10, D]
    mask: torch.Tensor  # [B, 1, S, S], 0 … 1: where the drawn face goes
    latent_mask: torch.Tensor  # [B, 1, s, s], alike


class Sampler:
    """anonymize or hide of a preset, with networks that are still in training.

    Args:
        network: The frozen model, for its conditioner.
        programs: Programs of the bundle whose guide steers, with its surrogates.
        device: Where the networks are.
    """

    def __init__(self, network: Diffusion, programs: Programs, device: str) -> None:
        self._network, self._programs, self._device = network, programs, device
        self.schedule = programs.bundle.manifest.schedule
        self.template = programs.bundle.template
        self._collection = Surrogates.load(programs.bundle)

    def masks(self, landmarks: Sequence[np.ndarray | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks [B, 1, S, S] and [B, 1, s, s] of faces with these landmarks; None: not found."""
        bundle = self._programs.bundle
        size, template = bundle.image_size, self.template
        masks = [
            face_mask(size, template) if own is None else fitted_mask(size, template, own)
            for own in landmarks
        ]
        small = [latent_mask(mask, bundle.dimensions.latent_size) for mask in masks]
        whole, cells = (torch.from_numpy(np.stack(m))[:, None] for m in (masks, small))
        return whole.to(self._device), cells.to(self._device)

    def conditions(self, faces: Faces, plan: Plan, timestep: int) -> torch.Tensor:
        """Conditioning [B, T, D] at a timestep."""
        conditioner = self._network.conditioner
        if timestep > plan.conditional_above:
            return conditioner.expand(faces.tokens[:, timestep // 100])
        if plan.surrogate:
            share, stage = plan.surrogate, timestep // 100
            mixed = share * faces.surrogates[:, stage] + (1 - share) * faces.tokens[:, stage]
            return conditioner.expand(mixed)
        return conditioner.unconditional().expand(len(faces.latent), -1, -1)

    def surrogates(
        self, tokens: torch.Tensor, identities: torch.Tensor, *, apart: bool
    ) -> torch.Tensor:
        """Tokens [B, 10, D] of those that anonymize (`apart`) or hide may draw faces with."""
        keys = [NoiseKey.random() for _ in tokens]
        mine, people = tokens.cpu().numpy(), identities.float().cpu().numpy()
        chosen = self._collection.choose(mine, people, keys, apart=apart)
        return torch.from_numpy(chosen[:, 0]).to(tokens.device)

    def guidance(self, faces: Faces, plan: Plan) -> IdentityGuidance:
        """The plan's guidance, away from these faces or towards them."""
        return IdentityGuidance(self._programs, plan.guidance, faces.identities.cpu().numpy())

    @torch.no_grad()
    def until(
        self,
        unet: Any,
        faces: Faces,
        plan: Plan,
        table: SamplerTable,
        guidance: IdentityGuidance,
        stop: int,
        rng: np.random.Generator,
    ) -> torch.Tensor:
        """Latents [B, C, s, s] before step `stop` of the table, sampled by `unet`."""
        clean = faces.latent.cpu().numpy()
        noise = rng.standard_normal(clean.shape, np.float32)
        x = add_noise(self.schedule, clean, noise, table.start_timestep)
        if stop:

            def denoise(x: np.ndarray, timestep: int, /) -> np.ndarray:
                given = torch.from_numpy(x).to(self._device)
                t = torch.full((len(x),), timestep, device=self._device)
                conditioning = self.conditions(faces, plan, timestep)
                with mixed_precision(self._device):
                    epsilon = unet(given, t, conditioning, return_dict=False)[0]
                return epsilon.float().cpu().numpy()  # type: ignore[no-any-return]

            blend = Background(self.schedule, plan, clean, noise, faces.latent_mask.cpu().numpy())
            x, _ = run(
                SamplerTable(table.name, table.start_timestep, table.steps[:stop]),
                x,
                denoise,
                gradient=guidance,
                noise=lambda _: rng.standard_normal(clean.shape, np.float32),
                blend=blend,
            )
        return torch.from_numpy(x).to(self._device)

    def clean(
        self, unet: Any, faces: Faces, plan: Plan, step: Step, x: torch.Tensor
    ) -> torch.Tensor:
        """The clean latent that `unet` predicts in x at a step; unguided."""
        t = torch.full((len(x),), step.timestep, device=x.device)
        epsilon = unet(x, t, self.conditions(faces, plan, step.timestep), return_dict=False)[0]
        clean: torch.Tensor = step.x0_x * x + step.x0_eps * epsilon.float()
        return clean

    def nudge(self, guidance: IdentityGuidance, step: Step, x0: torch.Tensor) -> torch.Tensor:
        """What guidance adds to a predicted clean latent."""
        if step.g == 0.0:
            return torch.zeros_like(x0)
        reach = step.g / self.schedule.signal(step.next_timestep)
        direction = guidance(x0.detach().cpu().numpy(), step)
        return torch.from_numpy(-reach * direction).float().to(x0.device)

    def pasted(self, decode: Any, faces: Faces, latent: torch.Tensor) -> torch.Tensor:
        """Decoded faces [B, 3, S, S] in their photos; around them the photos' clean latents."""
        whole = faces.latent + faces.latent_mask * (latent - faces.latent)
        face = decode(whole.to(memory_format=torch.channels_last)).float()
        pasted: torch.Tensor = faces.image + faces.mask * (face.clamp(-1.1, 1.1) - faces.image)
        return pasted
