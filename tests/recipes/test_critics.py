"""The critics of recipes/reference: what they see, and where it counts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes/reference"))
from critics import Standard, hinge, measure, merit, regard, score_head, within


def test_only_scores_where_the_face_is_count() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    score = torch.randn(2, 1, 8, 8)
    expected = score[:, :, 2:6, 2:6].mean()
    torch.testing.assert_close(within(score, mask), expected)
    outside = score.clone()
    outside[:, :, 0] = 100.0
    torch.testing.assert_close(merit([outside], [mask]), expected)
    torch.testing.assert_close(hinge([score + 9], [score - 9], [mask]), torch.tensor(0.0))


def test_what_all_faces_share_is_taken_away() -> None:
    common = 50 * torch.randn(1, 6, 1, 1)
    features = common + torch.randn(64, 6, 5, 5)
    standard = Standard(6)
    standard.measure(features)
    found = standard(features)
    assert np.allclose(found.mean((0, 2, 3)), 0, atol=1e-2)
    assert np.allclose(found.std((0, 2, 3)), 1, atol=2e-2)


def test_a_critic_learns_what_a_mean_drowns() -> None:
    torch.manual_seed(1)
    heads = nn.ModuleList(score_head(32) for _ in range(3))
    shapes = [(4, 4), (8, 8), (16, 16)]
    common = [30 * torch.randn(1, 32, 1, 1) for _ in shapes]
    sign = torch.randn(1, 32, 1, 1).sign()

    def faces(shift: float) -> list[torch.Tensor]:
        return [
            c + torch.randn(8, 32, *s) + shift * sign for c, s in zip(common, shapes, strict=True)
        ]

    measure(heads, faces(0.0))
    masks = [torch.ones(1, 1, 16, 16)] * 3
    optimizer = torch.optim.Adam(heads.parameters(), 2e-3)
    first = last = float("nan")
    for step in range(30):
        real, drawn = (
            [head(f) for head, f in zip(heads, faces(shift), strict=True)] for shift in (0.3, -0.3)
        )
        loss = hinge(real, drawn, masks)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        last = float(loss.detach())
        first = last if step == 0 else first
    assert last < 0.5 * first


def test_features_are_regarded_more_than_cheeks() -> None:
    template = np.array([[38, 50], [73, 50], [56, 70], [41, 91], [70, 91]], np.float64)
    weight = regard(template, 112)
    assert weight.shape == (1, 1, 112, 112)
    assert weight.dtype == torch.float32
    for x, y in template:
        assert weight[0, 0, int(y), int(x)] == 4
    assert weight[0, 0, 91, 56] > 3.9  # the mouth, between its corners
    assert weight[0, 0, 70, 20] < 1.2  # a cheek
    assert weight[0, 0, 10, 56] == pytest.approx(1, abs=1e-3)  # the forehead
    assert weight.min() >= 1
