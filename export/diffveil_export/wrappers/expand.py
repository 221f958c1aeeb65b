"""Program `expand`."""

from __future__ import annotations

import torch
from torch import nn

from diffveil_export.components import Expander

__all__ = ["Expand"]


class Expand(nn.Module):
    """tokens [N, D] → conditioning [N, T, W]."""

    def __init__(self, expander: Expander) -> None:
        super().__init__()
        self.expander = expander

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the text encoder on the placeholder's replacement."""
        return self.expander(tokens)
