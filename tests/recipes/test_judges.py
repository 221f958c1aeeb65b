"""The judges of recipes/reference: whom they want changed, and in which direction."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes/reference"))
from critics import FEATURES, look
from judges import Aims, Judges
from teacher import Teacher

from diffveil_export.reference.judge import GradeHeads
from diffveil_export.reference.recognizer import FaceRecognizer
from traced_teacher import saved_teacher

EVERYWHERE = torch.ones(1, 1, 128, 128)
ALONE = {"adversarial": 0.0, "likeness": 1.0}  # the recognizer's wish, and the light's


@pytest.fixture(scope="module")
def recognizer() -> FaceRecognizer:
    torch.manual_seed(0)
    network = FaceRecognizer(embedding=32).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # as it is, faces are all one to it
            nn.init.kaiming_normal_(module.weight)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def judges(recognizer: FaceRecognizer) -> Judges:
    torch.manual_seed(1)
    judges = Judges(recognizer, "cpu")
    judges.measure(0.3 * torch.randn(8, 3, 128, 128))
    return judges


def cosines(recognizer: FaceRecognizer, image: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    return (look(recognizer, image)[1] * known).sum(1)


def wish_beyond_light(
    judges: Judges,
    image: torch.Tensor,
    original: torch.Tensor,
    known: torch.Tensor,
    aims: Aims,
    *,
    hidden: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What is wished besides the photo's light, and the figures."""
    settings: Any = {"hidden": hidden, "step": 500}
    nothing = Aims(likeness=0.0, adversarial=0.0)
    wish, figures = judges.wish(image, original, known, EVERYWHERE, aims, **settings)
    light, _ = judges.wish(image, original, known, EVERYWHERE, nothing, **settings)
    return wish - light, figures


@pytest.mark.parametrize("hidden", [False, True])
def test_a_recognizer_wants_strangers_stranger_and_hidden_faces_known(
    judges: Judges, recognizer: FaceRecognizer, hidden: bool
) -> None:
    original = 0.3 * torch.randn(3, 3, 128, 128)
    image = original + 0.2 * torch.randn_like(original)
    _, known = look(recognizer, original)
    aims = Aims(strange=-1.0, known=1.0, **ALONE)
    wish, figures = wish_beyond_light(judges, image, original, known, aims, hidden=hidden)
    size = wish.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(size, torch.ones(3), rtol=1e-3, atol=0)
    before = cosines(recognizer, image, known)
    after = cosines(recognizer, image - 0.01 * wish, known)
    assert (after > before if hidden else after < before).all()
    name = "hidden cosine" if hidden else "cosine"
    torch.testing.assert_close(figures[name], before.mean(), rtol=0, atol=2e-2)  # in bfloat16


def test_faces_that_are_as_they_should_be_are_left_alone(
    judges: Judges, recognizer: FaceRecognizer
) -> None:
    original = 0.3 * torch.randn(2, 3, 128, 128)
    _, known = look(recognizer, original)
    for aims, hidden in ((Aims(strange=2.0, **ALONE), False), (Aims(known=-2.0, **ALONE), True)):
        wish, _ = judges.wish(original, original, known, EVERYWHERE, aims, hidden=hidden, step=500)
        assert not wish.any()
    darker, _ = judges.wish(
        original - 0.1, original, known, EVERYWHERE, aims, hidden=True, step=500
    )
    torch.testing.assert_close(darker, torch.full_like(darker, -0.3), rtol=1e-4, atol=0)


def test_the_critic_learns_and_its_wish_is_what_deceives_it(
    judges: Judges, recognizer: FaceRecognizer
) -> None:
    torch.manual_seed(2)
    real = 0.3 * torch.randn(4, 3, 128, 128)
    drawn = real.flip(0) + 0.3 * torch.sin(torch.arange(128.0))  # stripes
    optimizer = torch.optim.Adam(judges.critic.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = judges.mistakes(real, drawn, EVERYWHERE)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    _, known = look(recognizer, real)
    aims = Aims(likeness=0.0)
    none, _ = judges.wish(drawn, drawn, known, EVERYWHERE, aims, hidden=False, step=0)
    assert not none.any()
    wish, before = judges.wish(drawn, drawn, known, EVERYWHERE, aims, hidden=False, step=500)
    _, after = judges.wish(
        drawn - 0.05 * wish, drawn, known, EVERYWHERE, aims, hidden=False, step=500
    )
    assert after["score"] > before["score"]


def test_the_critic_learns_only_where_masks_show_a_face(judges: Judges) -> None:
    real, drawn = 0.3 * torch.randn(2, 2, 3, 128, 128)
    masks = torch.zeros(2, 1, 128, 128)
    masks[0, :, 30:100, 20:90] = 1
    other = torch.stack([drawn[0], real[0]])

    def change(where: torch.Tensor) -> float:
        loss, same = (float(judges.mistakes(real, d, where).detach()) for d in (drawn, other))
        return abs(loss - same)

    assert change(masks) < 0.1 * change(EVERYWHERE)  # the critic's norms move a little by being run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(saved_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt"))


def test_an_eye_wants_faces_more_natural_and_leaves_natural_ones_alone(
    recognizer: FaceRecognizer, teacher: Teacher
) -> None:
    torch.manual_seed(3)
    eye = GradeHeads([width for width, _ in teacher.shapes])
    judges = Judges(recognizer, "cpu", teacher=teacher, eye=eye)
    original = 0.3 * torch.randn(3, 3, 128, 128)
    _, known = look(recognizer, original)
    aims = Aims(adversarial=0.0, likeness=0.0, natural=0.7)
    wish, figures = judges.wish(original, original, known, EVERYWHERE, aims, hidden=True, step=9)
    assert 0 < figures["hidden natural"] < 1
    torch.testing.assert_close(wish.square().mean((1, 2, 3)).sqrt(), torch.full((3,), 0.7))
    eye.eval()  # without what it drops at random while it teaches

    def sure(image: torch.Tensor) -> torch.Tensor:
        return eye(teacher.features(image))

    assert (sure(original - 0.02 * wish) > sure(original)).all()
    with torch.no_grad():
        for head in eye.heads:
            head.grade.bias += 1000  # type: ignore[operator, union-attr]
    wish, _ = judges.wish(original, original, known, EVERYWHERE, aims, hidden=True, step=9)
    assert not wish.any()


def test_an_eye_needs_a_teacher_to_see_with(recognizer: FaceRecognizer) -> None:
    with pytest.raises(ValueError, match="teacher"):
        Judges(recognizer, "cpu", eye=GradeHeads([6, 10]))


@pytest.mark.parametrize("hidden", [False, True])
def test_the_teacher_has_its_own_opinion_of_identity(
    recognizer: FaceRecognizer, teacher: Teacher, hidden: bool
) -> None:
    judges = Judges(recognizer, "cpu", teacher=teacher)
    image, original = 0.3 * torch.randn(2, 3, 3, 128, 128)
    # The recognizer is content with what the teacher is not.
    known = look(recognizer, image)[1] * (1.0 if hidden else -1.0)
    aims = Aims(strange=-0.95, known=0.95, **ALONE)
    wish, figures = wish_beyond_light(judges, image, original, known, aims, hidden=hidden)
    before = (teacher.embed(image) * teacher.embed(original)).sum(1)
    after = (teacher.embed(image - 0.003 * wish) * teacher.embed(original)).sum(1)
    wrong = before < 0.95 if hidden else before > -0.95
    assert wrong.any()
    assert (after > before if hidden else after < before)[wrong].all()
    name = "hidden outsider" if hidden else "outsider"
    torch.testing.assert_close(figures[name], before.mean())


def test_the_critic_reads_the_teachers_features(
    recognizer: FaceRecognizer, teacher: Teacher
) -> None:
    judges = Judges(recognizer, "cpu", teacher=teacher)
    image = 0.3 * torch.randn(4, 3, 128, 128)
    judges.measure(image)
    assert len(judges.critic.heads) == len(FEATURES) + len(teacher.shapes)
    loss = judges.mistakes(image, image.flip(0), EVERYWHERE)
    loss.backward()  # type: ignore[no-untyped-call]
    for head in judges.critic.heads:
        assert any(p.grad is not None and p.grad.any() for p in head.parameters())


def test_the_critic_speaks_where_faces_are_regarded(recognizer: FaceRecognizer) -> None:
    original = 0.3 * torch.randn(2, 3, 128, 128)
    image = original + 0.2 * torch.randn_like(original)
    _, known = look(recognizer, original)
    aims = Aims(likeness=0.0)
    upper = torch.zeros(1, 1, 128, 128)
    upper[:, :, :40] = 1
    wishes = []
    for weight in (None, upper):
        torch.manual_seed(2)
        judges = Judges(recognizer, "cpu", regard=weight)
        judges.measure(original)
        wish, _ = wish_beyond_light(judges, image, original, known, aims, hidden=False)
        wishes.append(wish.square().mean((0, 1, 3)))
    everywhere, above = wishes
    assert everywhere[90:].mean() > 0.3 * everywhere[:40].mean()
    assert above[90:].mean() < 0.05 * above[:40].mean()
