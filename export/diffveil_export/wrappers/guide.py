"""Program `guide`, as autograd computes it. `diffveil_export.gradient` makes it forward-only."""

from __future__ import annotations

import torch
from torch import nn

from diffveil_export.components import Autoencoder, Recognizer
from diffveil_export.energy import identity_energy

__all__ = ["Guide"]


class Guide(nn.Module):
    """x0, anchor, repel, attract, sibling → gradient, energy, embedding.

    The gradient is that of the summed energy by x0, through decoder and recognizer.
    """

    def __init__(self, autoencoder: Autoencoder, recognizer: Recognizer) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.recognizer = recognizer

    def forward(
        self,
        x0: torch.Tensor,
        anchor: torch.Tensor,
        repel: torch.Tensor,
        attract: torch.Tensor,
        sibling: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Energy and gradient of predicted clean latents x0 [B, C, s, s]."""
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_(True)
            embedding = self.recognizer(self.autoencoder.decode(x0))
            energy = identity_energy(embedding, anchor, repel, attract, sibling)
            (gradient,) = torch.autograd.grad(energy.sum(), x0)
        return gradient, energy.detach(), embedding.detach()
