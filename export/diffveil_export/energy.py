"""The identity energy that steers anonymize and hide, in PyTorch."""

from __future__ import annotations

import torch

__all__ = ["identity_energy"]


def identity_energy(
    embedding: torch.Tensor,
    anchor: torch.Tensor,
    repel: torch.Tensor,
    attract: torch.Tensor,
    sibling: torch.Tensor,
) -> torch.Tensor:
    """Each face's share of the identity energy, [B]; their sum is

    E = Σ_b repel_b·max(cos(e_b, a_b), 0) + attract_b·(1 − cos(e_b, a_b))
        + Σ_{i<j} sibling_ij·max(cos(e_i, e_j), 0)

    (Diff-Privacy, arXiv 2309.05330, section IV: away from the photo and from each other, or
    towards the photo). A pair's term counts for its first member.

    Args:
        embedding: Unit embeddings e of the faces, [B, E].
        anchor: Unit embeddings a to leave or to approach, [B, E].
        repel: Weights of leaving, [B].
        attract: Weights of approaching, [B].
        sibling: Weights of pairs, [B, B]; only the strict upper triangle is read.
    """
    cosine = (embedding * anchor).sum(1)
    pairs = (embedding @ embedding.T).clamp(min=0) * sibling.triu(1)
    return repel * cosine.clamp(min=0) + attract * (1 - cosine) + pairs.sum(1)
