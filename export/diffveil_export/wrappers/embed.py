"""Program `embed`."""

from __future__ import annotations

import torch
from torch import nn

from diffveil_export.components import Embedder

__all__ = ["Embed"]


class Embed(nn.Module):
    """image [B, 3, S, S] → tokens [B, 10, D]."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Run vision tower and MSI."""
        return self.embedder(image)
