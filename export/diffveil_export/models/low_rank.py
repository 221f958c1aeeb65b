"""Low-rank changes to a network's weights that stay apart from them (Hu et al., arXiv 2106.09685).

A distilled network that differs from its teacher by a low-rank change shares the teacher's weights
in a bundle: engines add both up once, when they load the program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from diffveil.errors import OptionError

__all__ = [
    "FACTORS",
    "LowRankConv2d",
    "LowRankLinear",
    "add_low_rank",
    "load_low_rank",
    "low_rank_parameters",
    "low_rank_state",
]

FACTORS = (".down.weight", ".up.weight")
"""How the names of the parameters end that a low-rank change adds."""


class LowRankLinear(nn.Module):
    """A linear layer whose weight is W + up · down, W frozen; at first up is zero.

    Args:
        base: The layer; kept, not copied.
        rank: Rank of the change.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        _start(self.down, self.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer itself, with the changed weight."""
        base, up, down = self.base, self.up.weight, self.down.weight
        bias: torch.Tensor | None = base.bias
        if x.ndim == 2 and bias is not None:
            return F.linear(x, base.weight + up @ down, bias)
        # Exporters write such a layer as a product with the transposed weight. Only if the change
        # is added to that do both models have the same weight to share.
        result = x @ (base.weight.t() + down.t() @ up.t())
        return result if bias is None else result + bias


class LowRankConv2d(nn.Module):
    """A convolution whose weight, flattened to [O, I·kh·kw], is W + up · down, W frozen.

    Args:
        base: The layer; kept, not copied.
        rank: Rank of the change.
    """

    def __init__(self, base: nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        outputs, inputs = base.weight.shape[0], base.weight[0].numel()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        _start(self.down, self.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer itself, with the changed weight."""
        base = self.base
        change = (self.up.weight @ self.down.weight).view(base.weight.shape)
        return F.conv2d(
            x,
            base.weight + change,
            base.bias,
            base.stride,
            base.padding,
            base.dilation,
            base.groups,
        )


def _start(down: nn.Linear, up: nn.Linear) -> None:
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(up.weight)


def add_low_rank(network: nn.Module, rank: int) -> int:
    """Give every convolution and linear layer that gains by it a low-rank change, in place.

    Left as they are: layers that are hardly larger than the change would be.

    Args:
        network: Its own weights are frozen.
        rank: Rank of every change.

    Returns:
        How many layers were changed.

    Raises:
        OptionError: The rank is below one, or no layer is large enough.
    """
    if rank < 1:
        raise OptionError(f"rank: received {rank}, expected at least 1")
    network.requires_grad_(False)
    changed = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear | nn.Conv2d):
                continue
            outputs, inputs = child.weight.shape[0], child.weight[0].numel()
            if 2 * rank * (outputs + inputs) > outputs * inputs:
                continue
            if isinstance(child, nn.Linear):
                setattr(parent, name, LowRankLinear(child, rank))
            else:
                setattr(parent, name, LowRankConv2d(child, rank))
            changed += 1
    if not changed:
        raise OptionError(f"rank: received {rank}, but no layer is large enough for it")
    return changed


def low_rank_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that `add_low_rank` added."""
    return [p for name, p in network.named_parameters() if name.endswith(FACTORS)]


def low_rank_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that `add_low_rank` added, by name."""
    state = network.state_dict()
    return {name: value.detach() for name, value in state.items() if name.endswith(FACTORS)}


def load_low_rank(network: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Add the changes that `low_rank_state` returned to a network that has none, in place.

    Args:
        network: As the one that they were trained on.
        state: Tensors by name.

    Raises:
        OptionError: Names or shapes do not fit; the message names them.
    """
    ranks = {len(value) for name, value in state.items() if name.endswith(FACTORS[0])}
    if len(ranks) != 1:
        raise OptionError(f"low-rank weights: expected one rank, received {sorted(ranks)}")
    add_low_rank(network, ranks.pop())
    wanted = low_rank_state(network)
    wrong = sorted(set(wanted) ^ set(state))
    wrong += sorted(n for n in set(wanted) & set(state) if wanted[n].shape != state[n].shape)
    if wrong:
        raise OptionError(f"low-rank weights do not fit the network: {', '.join(wrong[:8])}")
    network.load_state_dict(dict(state), strict=False)
