"""Program `parse`, of bundles that have it."""

from __future__ import annotations

import torch
from torch import nn

from diffveil_export.components import Parser

__all__ = ["Parse"]


class Parse(nn.Module):
    """image [B, 3, S, S] → face [B, 1, S, S], the probability that a pixel is the face's."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Run the parser."""
        return self.parser(image)
