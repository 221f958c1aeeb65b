"""What a recognizer expects at its input, and the layers that get it there."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from diffveil_export.resize import LinearResize, bilinear, separable_matrix

__all__ = ["INPUT_FORMATS", "FacePreprocessing", "InputFormat"]

InputFormat = Literal["rgb-unit", "rgb-255", "bgr-unit", "bgr-255"]
"""Order of the channels, and whether values lie in [-1, 1] or in 0…255."""

INPUT_FORMATS: tuple[InputFormat, ...] = get_args(InputFormat)


class FacePreprocessing(nn.Module):
    """Gives a network what it expects, and returns unit embeddings whatever it returns.

    Args:
        network: Maps [B, 3, N, N], or [B, N, N, 3] if `channels_last`, to embeddings [B, E].
        size: Side N of the network's input in pixels. The 112-pixel crop is resized bilinearly:
            one constant matrix a dimension, no antialiasing.
        input_format: What the network expects.
        scale: Factor on values in [-1, 1]: FaceNet divides pixels by 128, not by 127.5.
        channels_last: Whether channels are the network's last axis.
    """

    def __init__(
        self,
        network: nn.Module,
        size: int = 112,
        input_format: InputFormat = "rgb-unit",
        scale: float = 1.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.input_format, self.scale, self.channels_last = input_format, scale, channels_last
        self.resize: LinearResize | None = None
        if size != 112:
            matrix = separable_matrix(112, bilinear(size))
            self.resize = LinearResize(matrix, matrix.clone())

    def forward(self, face: torch.Tensor) -> torch.Tensor:
        """Unit embeddings [B, E] of RGB crops [B, 3, 112, 112] in [-1, 1]."""
        x = face if self.resize is None else self.resize(face)
        order, values = self.input_format.split("-")
        if order == "bgr":
            x = x.flip(1)
        if values == "255":
            x = x * 127.5 + 127.5
        elif self.scale != 1:
            x = x * self.scale
        if self.channels_last:
            x = x.permute(0, 2, 3, 1)
        return nn.functional.normalize(self.network(x), dim=1)
