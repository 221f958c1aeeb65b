"""Program `guide`, as autograd computes it. `diffveil_export.gradient` makes it forward-only."""

from __future__ import annotations

import torch
from torch import nn

from diffveil_export.components import Decoder, Recognizer
from diffveil_export.energy import identity_energy
from diffveil_export.precision import Precision, arithmetic

__all__ = ["Guide"]


class Guide(nn.Module):
    """x0, anchor, repel, attract, sibling → gradient, energy, embedding.

    The gradient is that of the summed energy by x0, through decoder and recognizer. Inputs, outputs
    and the energy are float32 whatever the precision of the networks.

    Args:
        decoder: Decodes x0.
        recognizer: Embeds the decoded photo.
        precision: Arithmetic of both.
        loss_scale: Multiplies the energy before, and divides the gradient after the backward pass,
            so that 16-bit gradients do not vanish.
    """

    def __init__(
        self,
        decoder: Decoder,
        recognizer: Recognizer,
        precision: Precision = "float32",
        loss_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.recognizer = recognizer
        self.precision: Precision = precision
        self.loss_scale = loss_scale

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
            with arithmetic(self.precision):
                embedding = self.recognizer(self.decoder.decode(x0)).to(x0.dtype)
            energy = identity_energy(embedding, anchor, repel, attract, sibling)
            total = energy.sum() if self.loss_scale == 1 else energy.sum() * self.loss_scale
            (gradient,) = torch.autograd.grad(total, x0)
        if self.loss_scale != 1:
            gradient = gradient * (1 / self.loss_scale)  # a power of two: exact
        return gradient, energy.detach(), embedding.detach()
