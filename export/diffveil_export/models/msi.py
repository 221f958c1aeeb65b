"""MSI, multi-scale image inversion: five vision states to ten stage tokens.

He et al., arXiv 2309.05330, section III. Parameters are named as in published weight files:
`t_embed1`, `mlp0`…`mlp4`.`linear1`/`linear2`, `attn1`/`attn2`.`to_q`/`to_k`/`to_v`/`to_out.0` and
`net.1`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from diffveil.errors import OptionError
from diffveil.programs import STAGES

__all__ = ["MSI", "msi_from_state"]

_SCALES = 5


class _Projector(nn.Module):
    """Pooled vision state [B, V] to a unit vector [B, D]."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(vision_width, width, bias=False)
        self.linear2 = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.linear2(self.linear1(x)), dim=-1)


class _Attention(nn.Module):
    """Multi-head attention of [B, L, D] to [B, L', D]."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(0.05))

    def forward(self, query: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        def split(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

        q, k, v = split(self.to_q(query)), split(self.to_k(context)), split(self.to_v(context))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class MSI(nn.Module):
    """Stage i reads scale ⌊i/2⌋; every stage is a sequence of one, as in the published method.

    Args:
        vision_width: Width V of the vision tower's states.
        width: Width D of a token.
        inner: Width of all attention heads together.
        heads: Attention heads.
    """

    def __init__(
        self, vision_width: int = 1024, width: int = 768, inner: int = 512, heads: int = 8
    ) -> None:
        super().__init__()
        self.t_embed1 = nn.Embedding(STAGES, width)
        for scale in range(_SCALES):
            setattr(self, f"mlp{scale}", _Projector(vision_width, width))
        self.attn1 = _Attention(width, inner, heads)
        self.attn2 = _Attention(width, inner, heads)
        self.net = nn.Sequential(nn.Dropout(0.05), nn.Linear(width, width))

    def forward(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tokens [B, 10, D] of five vision states [B, L, V], finest first."""
        scales = [getattr(self, f"mlp{i}")(state.mean(1)) for i, state in enumerate(states)]
        unit = torch.stack(scales, 1).repeat_interleave(STAGES // _SCALES, 1)
        stages = (unit * self.t_embed1.weight).flatten(0, 1)[:, None]
        mixed = self.attn2(self.attn1(stages, stages), stages)
        tokens: torch.Tensor = self.net(mixed)
        return tokens.reshape(unit.shape)


def msi_from_state(state: Mapping[str, torch.Tensor], heads: int = 8) -> MSI:
    """Build the module whose sizes its weights have.

    Args:
        state: Weights by name.
        heads: Attention heads; weights do not tell.

    Raises:
        OptionError: Tensors are missing, unexpected or of the wrong shape; all are named.
    """
    try:
        width, vision_width = state["mlp0.linear1.weight"].shape
        inner = state["attn1.to_q.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise OptionError(f"not MSI weights: {error} is missing or misshapen") from error
    module = MSI(vision_width, width, inner, heads)
    expected = module.state_dict()
    problems = [f"missing {n}" for n in expected if n not in state]
    problems += [f"unexpected {n}" for n in state if n not in expected]
    problems += [
        f"{n}: received {list(t.shape)}, expected {list(expected[n].shape)}"
        for n, t in state.items()
        if n in expected and t.shape != expected[n].shape
    ]
    if problems:
        raise OptionError("MSI weights: " + ", ".join(problems))
    module.load_state_dict({n: t.to(torch.float32) for n, t in state.items()})
    return module.eval()
