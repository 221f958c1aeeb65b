"""Program `recognize`."""

from __future__ import annotations

import torch
from torch import nn

from diffveil_export.components import Recognizer

__all__ = ["Recognize"]


class Recognize(nn.Module):
    """image [B, 3, S, S] → embedding [B, E], unit length."""

    def __init__(self, recognizer: Recognizer) -> None:
        super().__init__()
        self.recognizer = recognizer

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Run the recognizer."""
        return self.recognizer(image)
