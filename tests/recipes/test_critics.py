"""The critics of recipes/reference: what they see, and where it counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes/reference"))
from critics import LatentCritic, Standard, denoiser_features, hinge, measure, merit, within
from train_diffusion import UNET

SMALL: dict[str, Any] = {"block_out_channels": (16, 32, 32), "cross_attention_dim": 16}


@pytest.fixture(scope="module")
def unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(**(UNET | SMALL))
    return network.double().eval().requires_grad_(False)


@pytest.mark.parametrize("batch", [1, 3])
def test_features_are_those_of_the_networks_own_pass(unet: Any, batch: int) -> None:
    x = torch.randn(batch, 8, 16, 16, dtype=torch.float64)
    t = torch.randint(0, 1000, (batch,))
    conditioning = torch.randn(batch, 8, 16, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    blocks = [unet.mid_block, *unet.up_blocks[:2]]
    hooks = [b.register_forward_hook(lambda _m, _i, out: seen.append(out)) for b in blocks]
    unet(x, t, conditioning)
    for hook in hooks:
        hook.remove()
    found = denoiser_features(unet, x, t, conditioning)
    assert len(found) == len(seen) == 3
    for mine, own in zip(found, seen, strict=True):
        size = own.square().mean((1, 2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(mine.double(), own / size, rtol=1e-5, atol=1e-5)


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


def test_a_critic_learns_what_a_mean_drowns(unet: Any) -> None:
    torch.manual_seed(1)
    critic = LatentCritic(unet)
    shapes = [(4, 4), (8, 8), (16, 16)]
    common = [30 * torch.randn(1, 32, 1, 1) for _ in shapes]
    sign = torch.randn(1, 32, 1, 1).sign()

    def faces(shift: float) -> list[torch.Tensor]:
        return [
            c + torch.randn(8, 32, *s) + shift * sign for c, s in zip(common, shapes, strict=True)
        ]

    measure(critic.heads, faces(0.0))
    masks = [torch.ones(1, 1, 16, 16)] * 3
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3)
    first = last = float("nan")
    for step in range(30):
        loss = hinge(critic(faces(0.3)), critic(faces(-0.3)), masks)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
        last = float(loss.detach())
        first = last if step == 0 else first
    assert last < 0.5 * first
