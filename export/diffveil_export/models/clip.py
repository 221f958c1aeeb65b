"""CLIP's two towers as this project needs them: vision states out, one text embedding replaced.

The layers' own modules are called one by one, so that what comes out does not depend on how a
version of transformers wraps them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from diffveil_export.models.msi import MSI
from diffveil_export.resize import LinearResize, bicubic, separable_matrix

__all__ = ["MSI_INPUTS", "MSIInput", "TextExpander", "VisionEmbedder"]

MSIInput = Literal["rgb", "release-uint8"]
MSI_INPUTS: tuple[MSIInput, ...] = ("rgb", "release-uint8")

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, RGB in [0, 1]
_STD = (0.26862954, 0.26130258, 0.27577711)
_STATES = (3, 7, 11, 15)  # and the last


def _layer(layer: Any, x: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """One pre-norm transformer layer on [B, L, D]."""
    attention = layer.self_attn

    def split(y: torch.Tensor) -> torch.Tensor:
        return y.reshape(*y.shape[:2], int(attention.num_heads), -1).transpose(1, 2)

    h = layer.layer_norm1(x)
    q, k, v = (split(p(h)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    out: torch.Tensor = x + layer.mlp(layer.layer_norm2(x))
    return out


class VisionEmbedder(nn.Module):
    """Images to stage tokens: CLIP preprocessing, vision tower once, MSI.

    Args:
        vision: A transformers `CLIPVisionModel`.
        msi: The embedder.
        image_size: Side S of the images in pixels.
        msi_input: What the MSI weights were trained on. "rgb" is the photo. "release-uint8" is
            what the research release feeds: the photo in [-1, 1] converted to uint8 without
            rescaling, which is black but for exact -1, which wraps around to white.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, vision: Any, msi: MSI, image_size: int, msi_input: MSIInput = "rgb") -> None:
        super().__init__()
        self.vision = getattr(vision, "vision_model", vision)  # transformers 4 nests it
        self.msi = msi
        self.msi_input = msi_input
        matrix = separable_matrix(image_size, bicubic(vision.config.image_size))
        self.resize = LinearResize(matrix, matrix)
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).reshape(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Tokens [B, 10, D] of images [B, 3, S, S] in [-1, 1]."""
        if self.msi_input == "rgb":
            pixels = (image + 1) / 2
        else:
            # Conversion to an unsigned byte: towards zero, then modulo 256.
            whole = image.trunc()
            pixels = torch.where(whole < 0, whole + 256, whole) / 255
        # Pillow, which CLIP's processor uses, clips what bicubic weights overshoot.
        pixels = self.resize(pixels).clamp(0, 1)
        x = self.vision.embeddings((pixels - self.mean) / self.std)
        x = self.vision.pre_layrnorm(x)
        states, last = [], len(self.vision.encoder.layers)
        for number, layer in enumerate(self.vision.encoder.layers, 1):
            x = _layer(layer, x, causal=False)
            if number in (*_STATES, last):
                states.append(x)
        tokens: torch.Tensor = self.msi(states)
        return tokens


class TextExpander(nn.Module):
    """Tokens to conditioning: CLIP's text encoder on the prompt "*", its embedding replaced.

    Args:
        text: A transformers `CLIPTextModel`.
        prompt: Token numbers [T] of the prompt.
        position: Where in `prompt` the placeholder stands.
    """

    embedded: torch.Tensor
    positions: torch.Tensor

    def __init__(self, text: Any, prompt: torch.Tensor, position: int) -> None:
        super().__init__()
        model = getattr(text, "text_model", text)  # transformers 4 nests it
        self.layers = model.encoder.layers
        self.final_layer_norm = model.final_layer_norm
        self.position = position
        embeddings = model.embeddings
        with torch.no_grad():
            self.register_buffer("embedded", embeddings.token_embedding(prompt)[None].clone())
            positions = embeddings.position_embedding.weight[: len(prompt)]
            self.register_buffer("positions", positions[None].clone())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Conditioning [N, T, D] of tokens [N, D]."""
        p = self.position
        prompt = self.embedded.expand(tokens.shape[0], -1, -1)
        x = torch.cat([prompt[:, :p], tokens[:, None], prompt[:, p + 1 :]], 1)
        return self._encode(x)

    def encode_prompt(self) -> torch.Tensor:
        """Conditioning [1, T, D] of the prompt as it is, nothing replaced."""
        return self._encode(self.embedded)

    def _encode(self, embedded: torch.Tensor) -> torch.Tensor:
        x = embedded + self.positions
        for layer in self.layers:
            x = _layer(layer, x, causal=True)
        out: torch.Tensor = self.final_layer_norm(x)
        return out
