"""Several recognizers as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from diffveil.errors import OptionError

__all__ = ["RecognizerEnsemble"]


class RecognizerEnsemble(nn.Module):
    """Joins members' unit embeddings into one whose cosine is the mean of the members' cosines.

    With the members' unit embeddings e_1 … e_K the joined embedding is

        e = [√v_1 · e_1, …, √v_K · e_K],    v_k = w_k / Σ w,

    a unit vector as wide as all members together. For two faces then ⟨e, e'⟩ = Σ v_k ⟨e_k, e_k'⟩:
    with equal weights (v_k = 1/K) the plain mean. Whatever steers or compares by cosine therefore
    steers and compares by all members at once, and its gradient is the mean of their gradients.
    Thresholds are the ensemble's own: those of a member do not carry over.

    Args:
        members: Each maps [B, 3, 112, 112] in [-1, 1] to unit embeddings [B, E_k].
        weights: Weights w_k ≥ 0 of the members, not all zero; by default equal.

    Raises:
        OptionError: No members, or weights that are negative, all zero or not one a member.
    """

    shares: torch.Tensor

    def __init__(
        self, members: Sequence[nn.Module], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        weights = [1.0] * len(members) if weights is None else list(weights)
        problems = []
        if not members:
            problems.append("an ensemble needs at least one recognizer")
        if len(weights) != len(members):
            problems.append(f"received {len(weights)} weights for {len(members)} recognizers")
        if not all(0 <= w < float("inf") for w in weights) or (weights and not sum(weights) > 0):
            problems.append(f"weights must be ≥ 0, finite and not all zero, received {weights}")
        if problems:
            raise OptionError("; ".join(problems))
        self.members = nn.ModuleList(members)
        shares = torch.tensor(weights, dtype=torch.float64)
        self.register_buffer("shares", (shares / shares.sum()).sqrt().to(torch.float32))

    def forward(self, face: torch.Tensor) -> torch.Tensor:
        """Unit embeddings [B, ΣE_k] of crops [B, 3, 112, 112] in [-1, 1]."""
        parts = [self.shares[k] * member(face) for k, member in enumerate(self.members)]
        return torch.cat(parts, 1)
