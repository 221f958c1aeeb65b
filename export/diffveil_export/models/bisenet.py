"""Face parsing: BiSeNet (Yu et al. 2018, arXiv 1808.00897) on a ResNet-18, 19 classes.

Tensor names are those of the widely used CelebAMask-HQ weights (face-parsing.PyTorch). The two
auxiliary heads that only train are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from diffveil.errors import OptionError
from diffveil_export.resize import LinearResize, bilinear, separable_matrix
from diffveil_export.sources.states import read_state

__all__ = ["FACE_CLASSES", "BiSeNet", "FaceParser", "bisenet_from_state", "load_parser"]

FACE_CLASSES = (1, 2, 3, 4, 5, 6, 10, 11, 12, 13)
"""Skin, brows, eyes, glasses, nose, mouth and lips; not ears, hair, neck, hats or cloth."""

_CLASSES = 19
_SIDE = 512
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_AUXILIARY = ("conv_out16.", "conv_out32.")


class _ConvNorm(nn.Module):
    def __init__(self, inner: int, outer: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class _BasicBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample: nn.Module | None = None
        if stride != 1 or inner != outer:
            self.downsample = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + (x if self.downsample is None else self.downsample(x)))


class _ResNet18(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._layer(width, width, 1)
        self.layer2 = self._layer(width, 2 * width, 2)
        self.layer3 = self._layer(2 * width, 4 * width, 2)
        self.layer4 = self._layer(4 * width, 8 * width, 2)

    @staticmethod
    def _layer(inner: int, outer: int, stride: int) -> nn.Sequential:
        return nn.Sequential(_BasicBlock(inner, outer, stride), _BasicBlock(outer, outer, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        eighth = self.layer2(self.layer1(x))
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


class _Refinement(nn.Module):
    """Attention refinement module."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv = _ConvNorm(inner, outer)
        self.conv_atten = nn.Conv2d(outer, outer, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        attention: torch.Tensor = self.bn_atten(self.conv_atten(x.mean((2, 3), keepdim=True)))
        return x * attention.sigmoid()


class _ContextPath(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnet = _ResNet18(width)
        self.arm16 = _Refinement(4 * width, 2 * width)
        self.arm32 = _Refinement(8 * width, 2 * width)
        self.conv_head32 = _ConvNorm(2 * width, 2 * width)
        self.conv_head16 = _ConvNorm(2 * width, 2 * width)
        self.conv_avg = _ConvNorm(8 * width, 2 * width, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        eighth, sixteenth, last = self.resnet(x)
        context = self.arm32(last) + self.conv_avg(last.mean((2, 3), keepdim=True))
        context = self.conv_head32(F.interpolate(context, scale_factor=2.0, mode="nearest"))
        context = self.arm16(sixteenth) + context
        context = self.conv_head16(F.interpolate(context, scale_factor=2.0, mode="nearest"))
        return eighth, context


class _Fusion(nn.Module):
    """Feature fusion module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convblk = _ConvNorm(width, width, 1)
        self.conv1 = nn.Conv2d(width, width // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(width // 4, width, 1, bias=False)

    def forward(self, spatial: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.convblk(torch.cat([spatial, context], 1))
        pooled = F.relu(self.conv1(x.mean((2, 3), keepdim=True)))
        attention: torch.Tensor = self.conv2(pooled).sigmoid()
        return x * attention + x


class _Output(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _ConvNorm(width, width)
        self.conv_out = nn.Conv2d(width, _CLASSES, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.conv_out(self.conv(x))
        return logits


class BiSeNet(nn.Module):
    """Class scores of a photo at an eighth of its size.

    Args:
        width: Channels of the first convolution; 64 in the published network.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.cp = _ContextPath(width)
        self.ffm = _Fusion(4 * width)
        self.conv_out = _Output(4 * width)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits [B, 19, H/8, W/8] of photos [B, 3, H, W], normalised as ImageNet; H and W
        multiples of 32."""
        spatial, context = self.cp(image)
        logits: torch.Tensor = self.conv_out(self.ffm(spatial, context))
        return logits


class FaceParser(nn.Module):
    """Where the face is, at the size of the crops of a bundle.

    The crop is resized to the 512 pixels of the network's training (other sides for tests), and its
    class probabilities back: two constant matrices each.

    Args:
        network: The parser.
        image_size: Side S of the crops in pixels.
        side: Side of the network's input in pixels, a multiple of 32.
    """

    def __init__(self, network: BiSeNet, image_size: int, side: int = _SIDE) -> None:
        super().__init__()
        self.network = network
        up = separable_matrix(image_size, bilinear(side))
        back = separable_matrix(side // 8, bilinear(image_size))
        self.enlarge, self.shrink = LinearResize(up, up), LinearResize(back, back)
        scale = torch.tensor(_STD).reshape(1, 3, 1, 1)
        self.register_buffer("scale", 0.5 / scale)
        self.register_buffer("shift", (0.5 - torch.tensor(_MEAN).reshape(1, 3, 1, 1)) / scale)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Probability [B, 1, S, S] that pixels of crops [B, 3, S, S] in [-1, 1] are the face."""
        x = self.enlarge(image) * self.get_buffer("scale") + self.get_buffer("shift")
        probability = self.network(x).softmax(1)
        face = torch.stack([probability[:, i] for i in FACE_CLASSES], 1).sum(1, keepdim=True)
        result: torch.Tensor = self.shrink(face)
        return result


def bisenet_from_state(state: Mapping[str, torch.Tensor]) -> BiSeNet:
    """Load weights by name.

    Args:
        state: Tensors by name; names may start with `module.`.

    Raises:
        OptionError: Tensors are missing, unexpected or of another shape; all are named.
    """
    own = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = {n: t for n, t in own.items() if not n.startswith(_AUXILIARY)}
    first = own.get("cp.resnet.conv1.weight")
    network = BiSeNet(64 if first is None or first.ndim != 4 else len(first))
    expected = network.state_dict()
    counters = {n for n in expected if n.endswith("num_batches_tracked")}
    problems = [f"missing {n}" for n in expected if n not in own and n not in counters]
    problems += [f"unexpected {n}" for n in own if n not in expected]
    problems += [
        f"{n}: received {list(t.shape)}, expected {list(expected[n].shape)}"
        for n, t in own.items()
        if n in expected and t.shape != expected[n].shape
    ]
    if problems:
        raise OptionError("face parser: " + "; ".join(problems))
    network.load_state_dict({**{n: expected[n] for n in counters}, **own})
    return network.float().eval().requires_grad_(False)


def load_parser(file: Path, image_size: int) -> FaceParser:
    """A face parser from a file of weights.

    Args:
        file: State dict, safetensors or a plain PyTorch file.
        image_size: Side S of the crops in pixels.

    Raises:
        OptionError: The file cannot be read, or its tensors do not fit.
    """
    return FaceParser(bisenet_from_state(read_state(file)), image_size).eval()
