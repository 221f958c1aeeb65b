"""The traced gradient: exact, forward-only, dynamic in batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from diffveil.programs import PROGRAMS
from diffveil_export.gradient import conv_input_gradient, trace_gradient
from diffveil_export.verify import random_inputs
from diffveil_export.wrappers import wrap
from tiny_models import tiny_components

GUIDE = PROGRAMS["guide"]
BATCH_AXES = ((0,), (0,), (0,), (0,), (0, 1))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 10)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((3, 3), 1, (1, 1)),
        ((3, 3), 1, (0, 0)),
        ((1, 1), 1, (0, 0)),
        ((5, 3), 1, (2, 1)),
        ((2, 2), 1, (3, 3)),
        ((3, 3), 2, (1, 1)),
        ((3, 3), 2, (0, 0)),
        ((1, 1), 2, (0, 0)),
        ((2, 2), 2, (0, 0)),
        ((4, 4), 2, (1, 1)),
        ((3, 5), 3, (1, 2)),
        ((1, 1), 4, (0, 0)),
    ],
)
def test_conv_input_gradient_is_autograds(
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    size: tuple[int, int],
    groups: int,
    generator: torch.Generator,
) -> None:
    weight = torch.randn(8, 4 // groups, *kernel, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64, requires_grad=True)
    y = nn.functional.conv2d(x, weight, stride=stride, padding=padding, groups=groups)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(y, x, upstream)
    actual = conv_input_gradient(upstream, weight, size, (stride, stride), padding, groups)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class _Gradient(nn.Module):
    """The gradient of a fixed scalar of a network's output by its input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.network(x).square().sum()
            (gradient,) = torch.autograd.grad(energy, x)
        return gradient


class _Slices(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, 1:-1, 2:][:, :, ::2, 1::3]


class _Ties(nn.Module):
    """Few different numbers, whatever the input is; yet the gradient is that of the identity."""

    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.register_buffer("values", torch.randint(1, 4, (4, 10, 10), generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.detach() + self.values


class _Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)[:, None]
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens.sin())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm": lambda: nn.LayerNorm(10),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "silu": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.SiLU()),
    "prelu": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.PReLU(4)),
    "gelu": nn.GELU,
    "strided": lambda: nn.Conv2d(4, 6, 3, 2, 1),
    "dilated": lambda: nn.Conv2d(4, 6, 3, 1, 2, dilation=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, 1, 1, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 4, 2, 1),
    "nearest": lambda: nn.Upsample(scale_factor=2.0, mode="nearest"),
    "pixel shuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
    "average pool": lambda: nn.AvgPool2d(2),
    "average pool, overlapping": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average pool, ceil": lambda: nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True),
    "max pool": lambda: nn.MaxPool2d(2),
    "max pool, overlapping": lambda: nn.MaxPool2d(3, 2),
    "max pool, padded": lambda: nn.MaxPool2d(3, 2, 1),
    "max pool, ceil": lambda: nn.MaxPool2d((3, 2), 3, ceil_mode=True),
    "max pool, dilated": lambda: nn.MaxPool2d(2, 1, dilation=2),
    "max pool of ties": lambda: nn.Sequential(_Ties(), nn.MaxPool2d(3, 2, 1)),
    "softplus": nn.Softplus,
    "hard swish": nn.Hardswish,
    "slices": _Slices,
    "attention": _Attention,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_trace_exactly_and_for_any_batch(name: str, generator: torch.Generator) -> None:
    network = NETWORKS[name]()
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    module = _Gradient(network.double())
    example = torch.randn(2, 4, 10, 10, generator=generator, dtype=torch.float64)
    traced = trace_gradient(module, (example,), ((0,),))
    assert not [n for n in traced.graph.nodes if "backward" in str(n.target)]
    for batch in (1, 2, 3):
        x = torch.randn(batch, 4, 10, 10, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(traced(x), module(x), rtol=1e-10, atol=1e-10)


def test_guide_traces_to_forward_operators_only() -> None:
    components = tiny_components()
    inputs = random_inputs(GUIDE, components.dimensions, 2, torch.Generator().manual_seed(1))
    graph = trace_gradient(wrap(components, "guide"), inputs, BATCH_AXES)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "backward" in name]
    transposed = [
        node
        for node in graph.graph.nodes
        if str(node.target) == "aten.convolution.default" and node.args[6]
    ]
    assert not transposed


def test_guide_gradient_is_the_slope_of_the_energy(generator: torch.Generator) -> None:
    """Against central differences in float64, where their error is about 1e-9."""
    components = tiny_components(seed=3).to(torch.float64)
    guide = wrap(components, "guide")
    inputs = [x.double() for x in random_inputs(GUIDE, components.dimensions, 3, generator)]
    gradient, energy, _ = guide(*inputs)
    step = 1e-5
    for _ in range(4):
        direction = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64)
        ahead = guide(inputs[0] + step * direction, *inputs[1:])[1].sum()
        behind = guide(inputs[0] - step * direction, *inputs[1:])[1].sum()
        slope = (ahead - behind) / (2 * step)
        torch.testing.assert_close(
            (gradient * direction).sum(), slope, rtol=1e-6, atol=1e-9 * float(energy.sum())
        )


def test_energy_terms_do_what_they_say(generator: torch.Generator) -> None:
    from diffveil_export.energy import identity_energy

    e = nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=1)
    off, on, none = torch.zeros(3), torch.ones(3), torch.zeros(3, 3)
    away = identity_energy(e, e, on, off, none)
    torch.testing.assert_close(away, torch.ones(3))
    torch.testing.assert_close(identity_energy(e, -e, on, off, none), torch.zeros(3))
    torch.testing.assert_close(identity_energy(e, -e, off, on, none), 2 * torch.ones(3))
    pairs = torch.full((3, 3), 0.5)
    share = identity_energy(e, e, off, off, pairs)
    cosine = (e @ e.T).clamp(min=0) / 2
    expected = torch.stack([cosine[0, 1] + cosine[0, 2], cosine[1, 2], torch.tensor(0.0)])
    torch.testing.assert_close(share, expected)


@pytest.mark.parametrize(
    "enlarge",
    [
        {"scale_factor": 2.0, "mode": "nearest"},
        {"scale_factor": (3, 1), "mode": "nearest-exact"},
        {"size": (8, 15), "mode": "nearest"},
        {"size": 20},
        {"scale_factor": 1.5, "mode": "nearest"},
    ],
)
def test_enlarging_by_repetition(enlarge: dict[str, Any]) -> None:
    """Whole factors become repetition, values and gradient alike; others stay as they are."""
    generator = torch.Generator().manual_seed(12)

    class Enlarge(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                y = nn.functional.interpolate(x, **enlarge)
                (gradient,) = torch.autograd.grad((y.sin() * y).sum(), x)
            return y.detach(), gradient

    shape = (2, 3, 4, 5) if enlarge.get("size") != 20 else (2, 3, 4, 4)
    example = torch.randn(shape, generator=generator)
    traced = trace_gradient(Enlarge(), (example,), ((0,),))
    names = " ".join(str(node.target) for node in traced.graph.nodes)
    assert ("index" in names) == (enlarge.get("scale_factor") == 1.5)
    for batch in (1, 3):
        x = torch.randn(batch, *shape[1:], generator=generator)
        for ours, theirs in zip(traced(x), Enlarge()(x), strict=True):
            torch.testing.assert_close(ours, theirs)
