"""The teacher of recipes/reference: features of its first look, and its own embedding."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes/reference"))
from teacher import Teacher

from traced_teacher import saved_teacher


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt")


@pytest.mark.parametrize("batch", [1, 3])
def test_features_are_those_of_the_first_look(file: Path, batch: int) -> None:
    teacher = Teacher(file)
    assert teacher.shapes == [(6, 14), (10, 7)]
    image = (torch.rand(batch, 3, 128, 128) * 2 - 1).requires_grad_()
    features = teacher.features(image)
    assert [tuple(f.shape) for f in features] == [(batch, 6, 14, 14), (batch, 10, 7, 7)]
    # What lies outside ArcFace's framing is not seen; features of a mirrored face are others.
    framed = F.pad(image[:, :, 8:120, 8:120], (8,) * 4)
    for seen, again, mirrored in zip(
        features, teacher.features(framed), teacher.features(image.flip(3)), strict=True
    ):
        torch.testing.assert_close(seen, again)
        assert not torch.allclose(seen, mirrored)
    (gradient,) = torch.autograd.grad(features[1].sum(), image)
    assert gradient[:, :, 8:120, 8:120].any()


def test_embeddings_are_the_networks_own(file: Path) -> None:
    image = torch.rand(2, 3, 128, 128) * 2 - 1
    network = torch.jit.load(file)  # type: ignore[no-untyped-call]
    expected = network(127.5 * (image[:, :, 8:120, 8:120] + 1))
    embedding = Teacher(file).embed(image)
    torch.testing.assert_close(embedding, F.normalize(expected))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))


def test_a_graph_that_was_not_frozen_is_refused(tmp_path: Path) -> None:
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()
    traced = torch.jit.trace(plain, torch.zeros(1, 3, 112, 112))  # type: ignore[no-untyped-call]
    torch.jit.save(traced, tmp_path / "plain.pt")  # type: ignore[no-untyped-call]
    with pytest.raises(SystemExit, match="freeze it"):
        Teacher(tmp_path / "plain.pt")


def test_a_graph_without_residual_blocks_is_refused(tmp_path: Path) -> None:
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    traced = torch.jit.trace(plain, torch.zeros(1, 3, 112, 112))  # type: ignore[no-untyped-call]
    torch.jit.save(torch.jit.freeze(traced), tmp_path / "plain.pt")  # type: ignore[no-untyped-call]
    with pytest.raises(SystemExit, match="no residual blocks"):
        Teacher(tmp_path / "plain.pt")
