"""What a sampling step computes between its networks, as PyTorch modules.

In one graph with the networks it is `Predict` and `Update`; as programs of their own, with any
number of gradients a step, `PredictProgram`, `Steer` and `Advance`.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Advance", "Predict", "PredictProgram", "Steer", "Update"]

_VANISHING_RMS = 1e-12  # that of `diffveil.guidance`


class Predict(nn.Module):
    """latent, epsilon, coefficients → predicted clean latent x0, all [B, C, s, s] but [B, Q]."""

    def forward(
        self, latent: torch.Tensor, epsilon: torch.Tensor, coefficients: torch.Tensor
    ) -> torch.Tensor:
        """x0 = x0_x·latent + x0_eps·ε."""
        q = coefficients[:, :, None, None, None]
        return q[:, 6] * latent + q[:, 7] * epsilon


class Update(nn.Module):
    """What one step does after the guide was asked: `diffveil.guidance`, the sampler, the blend."""

    def forward(
        self,
        latent: torch.Tensor,
        previous: torch.Tensor,
        epsilon: torch.Tensor,
        previous_epsilon: torch.Tensor,
        coefficients: torch.Tensor,
        noise: torch.Tensor,
        gradient: torch.Tensor,
        embedding: torch.Tensor,
        anchor: torch.Tensor,
        repel: torch.Tensor,
        attract: torch.Tensor,
        sibling: torch.Tensor,
        release: torch.Tensor,
        normalise: torch.Tensor,
        background: torch.Tensor,
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next latent [B, C, s, s], and which rows were pushed [B], 1 or 0."""
        pushed = _pushed(embedding, anchor, repel, attract, sibling, release)
        direction = _sized(gradient, normalise, pushed)
        terms = (latent, previous, epsilon, previous_epsilon, noise, direction)
        return _blended(_combined(coefficients, *terms), background, mask), pushed


class PredictProgram(nn.Module):
    """Program `predict`: where the next gradient of a step is asked for."""

    def forward(
        self,
        latent: torch.Tensor,
        epsilon: torch.Tensor,
        coefficients: torch.Tensor,
        direction: torch.Tensor,
        reach: torch.Tensor,
    ) -> torch.Tensor:
        """x0 = x0_x·latent + x0_eps·ε − reach·direction, [B, C, s, s]."""
        x0: torch.Tensor = Predict()(latent, epsilon, coefficients)
        return x0 - reach[:, None, None, None] * direction


class Steer(nn.Module):
    """Program `steer`: what `diffveil.guidance` does with an answer of the guide."""

    def forward(
        self,
        gradient: torch.Tensor,
        embedding: torch.Tensor,
        anchor: torch.Tensor,
        repel: torch.Tensor,
        attract: torch.Tensor,
        sibling: torch.Tensor,
        release: torch.Tensor,
        normalise: torch.Tensor,
        direction: torch.Tensor,
        keep: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """keep·direction + the sized gradient [B, C, s, s], and which rows were pushed [B]."""
        pushed = _pushed(embedding, anchor, repel, attract, sibling, release)
        return keep[:, None, None, None] * direction + _sized(gradient, normalise, pushed), pushed


class Advance(nn.Module):
    """Program `advance`: the sampler's update and the blend."""

    def forward(
        self,
        latent: torch.Tensor,
        previous: torch.Tensor,
        epsilon: torch.Tensor,
        previous_epsilon: torch.Tensor,
        coefficients: torch.Tensor,
        noise: torch.Tensor,
        direction: torch.Tensor,
        background: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """The next latent [B, C, s, s]."""
        terms = (latent, previous, epsilon, previous_epsilon, noise, direction)
        return _blended(_combined(coefficients, *terms), background, mask)


def _pushed(
    embedding: torch.Tensor,
    anchor: torch.Tensor,
    repel: torch.Tensor,
    attract: torch.Tensor,
    sibling: torch.Tensor,
    release: torch.Tensor,
) -> torch.Tensor:
    """Rows [B] that are not yet where they should be: 1, the others 0."""
    cosine = (embedding * anchor).sum(1)
    beyond = torch.where(attract > repel, cosine, -cosine) >= release
    pairs = sibling.triu(1)
    involved = (pairs + pairs.T) > 0
    alike = (embedding @ embedding.T) > 0
    held = (alike & involved).to(cosine.dtype).sum(1) > 0
    return (held | ~beyond).to(cosine.dtype)


def _sized(gradient: torch.Tensor, normalise: torch.Tensor, pushed: torch.Tensor) -> torch.Tensor:
    """Gradients [B, C, s, s] of unit size where that is asked for, zero where not pushed."""
    rms = gradient.square().mean((1, 2, 3)).sqrt()
    unit = torch.where(rms > _VANISHING_RMS, 1 / rms.clamp(min=_VANISHING_RMS), 0.0)
    scale = pushed * torch.where(normalise > 0, unit, torch.ones_like(unit))
    return gradient * scale[:, None, None, None]


def _combined(
    coefficients: torch.Tensor,
    latent: torch.Tensor,
    previous: torch.Tensor,
    epsilon: torch.Tensor,
    previous_epsilon: torch.Tensor,
    noise: torch.Tensor,
    direction: torch.Tensor,
) -> torch.Tensor:
    """The row of the sampler's table: see `diffveil.samplers.table`."""
    a0, a1, b0, b1, n, g, _, _ = coefficients[:, :, None, None, None].unbind(1)
    x = a0 * latent + a1 * previous + b0 * epsilon + b1 * previous_epsilon + n * noise
    return x - g * direction


def _blended(x: torch.Tensor, background: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The background where the mask is 0, x bit for bit where it is 1 over zeros."""
    return background + mask * (x - background)
