"""Networks of a GAN's size, for timing alone: a StyleGAN2 generator and a pSp/e4e encoder.

Anonymizing with a GAN inverts a face with an encoder, changes its style vectors and generates. The
layers are those of Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", arXiv
1912.04958 (configuration F), and of Richardson et al., "Encoding in Style", arXiv 2008.00951,
which e4e (arXiv 2102.02766) shares. Weights are random.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from diffveil_export.models.irse50 import IRSE50

__all__ = ["GanAnonymizer", "StyleEncoder", "StyleGenerator"]

_COARSE, _MIDDLE = 3, 7
"""Style vectors before these are read from the coarsest features, and from those of middle size."""


class _ModulatedConv(nn.Module):
    """A convolution whose weights a style scales, and which is brought back to unit variance."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, style: int, *, up: bool, demodulate: bool
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(outputs, inputs, kernel, kernel) / math.sqrt(inputs * kernel**2)
        )
        self.affine = nn.Linear(style, inputs)
        self.up, self.demodulate = up, demodulate
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", (taps[:, None] * taps / taps.sum() ** 2 * 4)[None, None])

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        scale = self.affine(style) + 1
        # Scaling the input and the output does what scaling the weights would.
        x = x * scale[:, :, None, None]
        if self.up:
            x = functional.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2)
            blur = self.blur.expand(x.shape[1], 1, 4, 4)  # type: ignore[operator]
            x = functional.conv2d(x, blur, padding=1, groups=x.shape[1])
        else:
            x = functional.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2)
        if self.demodulate:
            energy = (scale**2) @ self.weight.pow(2).sum(dim=(2, 3)).T
            x = x * torch.rsqrt(energy + 1e-8)[:, :, None, None]
        return x


class _StyledConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, style: int, *, up: bool = False) -> None:
        super().__init__()
        self.conv = _ModulatedConv(inputs, outputs, 3, style, up=up, demodulate=True)
        self.noise = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1, outputs, 1, 1))

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        x = self.conv(x, style)
        x = x + self.noise * torch.randn_like(x[:, :1]) + self.bias
        return functional.leaky_relu(x, 0.2) * math.sqrt(2)


class StyleGenerator(nn.Module):
    """Synthesis network of StyleGAN2 with skips.

    Args:
        size: Side of its pictures.
        most: Most channels of a layer, and the width of a style; 512 as published.
    """

    def __init__(self, size: int = 1024, most: int = 512) -> None:
        super().__init__()

        def channels(side: int) -> int:
            return min(most, 2**15 // side) if most == 512 else most

        self.constant = nn.Parameter(torch.randn(1, channels(4), 4, 4))
        self.first = _StyledConv(channels(4), channels(4), most)
        self.picture = nn.ModuleList(
            [_ModulatedConv(channels(4), 3, 1, most, up=False, demodulate=False)]
        )
        self.convs = nn.ModuleList()
        sides = [2**i for i in range(3, size.bit_length())]
        for side in sides:
            before, now = channels(side // 2), channels(side)
            self.convs.append(_StyledConv(before, now, most, up=True))
            self.convs.append(_StyledConv(now, now, most))
            self.picture.append(_ModulatedConv(now, 3, 1, most, up=False, demodulate=False))
        self.styles = 2 * len(sides) + 2

    def forward(self, styles: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, size, size] of styles [B, K, W]."""
        x = self.first(self.constant.expand(len(styles), -1, -1, -1), styles[:, 0])
        picture: torch.Tensor = self.picture[0](x, styles[:, 1])
        for index in range(len(self.convs) // 2):
            x = self.convs[2 * index](x, styles[:, 2 * index + 1])
            x = self.convs[2 * index + 1](x, styles[:, 2 * index + 2])
            picture = functional.interpolate(picture, scale_factor=2, mode="bilinear")
            picture = picture + self.picture[index + 1](x, styles[:, 2 * index + 3])
        return picture


class _StyleBlock(nn.Module):
    """Features to one style vector, halving their side until nothing is left of it."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(int(math.log2(side))):
            layers += [nn.Conv2d(width, width, 3, 2, 1), nn.LeakyReLU()]
        self.convs = nn.Sequential(*layers)
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.convs(x).flatten(1))  # type: ignore[no-any-return]


class StyleEncoder(nn.Module):
    """Photos to style vectors: an IR-SE50, a feature pyramid, and a small network a vector.

    Args:
        size: Side of its photos.
        width: Width of the pyramid and of a style; 512 as published.
        styles: Number of style vectors.
    """

    def __init__(self, size: int = 256, width: int = 512, styles: int = 18) -> None:
        super().__init__()
        # Sides and channels of the backbone's features after its second, third and last stage.
        if width == 512:
            trunk, channels = IRSE50(), (128, 256, 512)
        else:
            stages = ((16, 1), (16, 1), (32, 1), (width, 1))
            trunk, channels = IRSE50(width, stages), (16, 32, width)
        self.input_layer, self.body = trunk.input_layer, trunk.body
        self.taps = _stage_ends(self.body)
        sides = (size // 4, size // 8, size // 16)
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels[:2])
        self.levels = [2 if i < _COARSE else 1 if i < _MIDDLE else 0 for i in range(styles)]
        self.blocks = nn.ModuleList(_StyleBlock(width, sides[level]) for level in self.levels)

    def forward(self, photo: torch.Tensor) -> torch.Tensor:
        """Styles [B, K, W] of photos [B, 3, size, size]."""
        x, features = self.input_layer(photo), []
        for index, unit in enumerate(self.body):
            x = unit(x)
            if index in self.taps:
                features.append(x)
        pyramid = [features[-1]]
        for lateral, feature in zip(reversed(self.lateral), reversed(features[:-1]), strict=True):
            above = functional.interpolate(pyramid[0], size=feature.shape[-2:], mode="bilinear")
            pyramid.insert(0, above + lateral(feature))
        return torch.stack(
            [block(pyramid[level]) for level, block in zip(self.levels, self.blocks, strict=True)],
            dim=1,
        )


class GanAnonymizer(nn.Module):
    """Encoder, a step in style space, generator.

    Args:
        generator: Side of the pictures, and most channels.
        encoder: Side of the photos, and width.
    """

    def __init__(self, generator: tuple[int, int], encoder: tuple[int, int]) -> None:
        super().__init__()
        self.generator = StyleGenerator(*generator)
        self.encoder = StyleEncoder(*encoder, styles=self.generator.styles)

    def forward(self, photo: torch.Tensor) -> torch.Tensor:
        """Other faces [B, 3, side, side] of photos [B, 3, S, S] in [-1, 1]."""
        styles = self.encoder(photo)
        return self.generator(styles + 0.1 * torch.randn_like(styles))  # type: ignore[no-any-return]


def _stage_ends(body: nn.Sequential) -> list[int]:
    """Positions of the last units of the second, third and fourth stage."""
    photo = torch.zeros(1, next(body.parameters()).shape[0], 64, 64)
    sides = []
    body.eval()
    with torch.no_grad():
        for unit in body:
            photo = unit(photo)
            sides.append(photo.shape[-1])
    return [max(i for i, side in enumerate(sides) if side == 64 // 2**k) for k in (2, 3, 4)]
