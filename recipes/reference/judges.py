"""Who looks at faces drawn into photos, and how each wants them changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import mixed_precision, place
from critics import FaceCritic, hinge, look, measure, merit
from distill import unit
from teacher import Teacher
from torch import nn
from torch.nn import functional as F

from diffveil_export.reference.judge import GradeHeads
from diffveil_export.reference.recognizer import FaceRecognizer

_NATURAL = 2.0  # log-odds of naturalness that leave nothing to wish
_WARM_UP = 150  # steps until the critic counts in full: it knows nothing at first


@dataclass(frozen=True)
class Aims:
    """What faces are to reach.

    Attributes:
        adversarial: Weight of the critic.
        likeness: Weight of the recognizers.
        strange: Cosine to the photo's person that is strange enough.
        known: Cosine that a hidden face is to keep.
        natural: Weight of the eye, where there is one.
    """

    adversarial: float = 1.0
    likeness: float = 0.3
    strange: float = 0.0
    known: float = 0.6
    natural: float = 2.0


def _uphill(loss: torch.Tensor, image: torch.Tensor, *, keep: bool = False) -> torch.Tensor:
    """The loss's gradient [B, 3, S, S], of unit size a face; zero where a face has none.

    With `keep`, more gradients may be taken through what was computed.
    """
    (gradient,) = torch.autograd.grad(loss, image, retain_graph=keep)
    at_all = gradient.abs().amax((1, 2, 3), keepdim=True) > 1e-9
    return at_all * unit(gradient)


class Judges:
    """A critic in training, the frozen recognizer and, where they are given, two more.

    Args:
        recognizer: The bundle's.
        device: Where all of them are.
        teacher: What the recognizer was distilled from: one more that faces are to deceive, and
            features for the critic.
        eye: What learned from grades how natural faces look by the teacher's features.
        regard: How much each place of a face counts for the critic, [1, 1, S, S].
        wrap: `torch.compile`, or what leaves functions as they are.
    """

    def __init__(
        self,
        recognizer: FaceRecognizer,
        device: str,
        *,
        teacher: Teacher | None = None,
        eye: GradeHeads | None = None,
        regard: torch.Tensor | None = None,
        wrap: Callable[[Any], Any] = lambda function: function,
    ) -> None:
        shapes = teacher.shapes if teacher else []
        self.critic = place(FaceCritic([width for width, _ in shapes]), device)
        self._recognizer, self._device, self._teacher = recognizer, device, teacher
        self._seen = slice(recognizer.margin, recognizer.margin + recognizer.size)
        self._regard = (torch.ones(1) if regard is None else regard).to(device)
        if eye is not None and teacher is None:
            raise ValueError("an eye sees with a teacher: none is given")
        self._eye = eye
        if eye is not None:
            place(eye.requires_grad_(False), device)
            for module in eye.modules():  # no two looks alike: what deceives one says little
                module.train(isinstance(module, nn.Dropout | nn.Dropout2d))
        self._judged, self._scored, self._see = wrap(self._judge), wrap(self.critic), wrap(look)

    def measure(self, images: torch.Tensor) -> None:
        """Let the critic know the features of real faces [B, 3, S, S]."""
        with torch.no_grad():
            features, _ = look(self._recognizer, images)
            measure(self.critic.heads, [*features, *self._outside(images)])

    def wish(
        self,
        image: torch.Tensor,
        original: torch.Tensor,
        identities: torch.Tensor,
        masks: torch.Tensor,
        aims: Aims,
        *,
        hidden: bool,
        step: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Where all of them together would move drawn faces, as a gradient to descend.

        Every wish is brought to unit size, face by face, before they are weighed. The photo's light
        is one of them: the mean colour of 8 × 8 patches stays.

        Args:
            image: Drawn faces in their photos, [B, 3, S, S] in [-1, 1].
            original: The photos, alike.
            identities: Unit embeddings of the photos, [B, E].
            masks: Where the drawn faces are, [B, 1, S, S].
            aims: What is to be reached.
            hidden: Whether the faces are to stay known.
            step: Number of the training's step.

        Returns:
            Gradient [B, 3, S, S], and figures to log.
        """

        def wrong(cosine: torch.Tensor) -> torch.Tensor:
            return F.relu(aims.known - cosine if hidden else cosine - aims.strange).sum()

        shown = image.detach().requires_grad_()
        outside, theirs = self._teacher.look(shown) if self._teacher else ([], None)
        with mixed_precision(self._device):
            scores, embedding = self._judged(shown, outside)
        merits = merit(scores, self._over(masks))
        cosine = (embedding * identities).sum(1)
        kind = "hidden " if hidden else ""
        figures = {f"{kind}cosine": cosine.mean(), "score": merits}
        likeness = wrong(cosine)
        if self._teacher is not None and theirs is not None:
            with torch.no_grad():
                known = self._teacher.embed(original)
            cosine = (theirs * known).sum(1)
            likeness = likeness + wrong(cosine)
            figures[f"{kind}outsider"] = cosine.mean()
        lit = F.avg_pool2d(shown.detach() - original, 16)
        figures["light"] = lit.abs().mean()
        toward = F.interpolate(lit, scale_factor=16, mode="bilinear") * 3
        (gradient,) = torch.autograd.grad(-merits, shown, retain_graph=True)
        toward = toward + aims.adversarial * min(1.0, step / _WARM_UP) * unit(gradient)
        toward = toward + aims.likeness * _uphill(likeness, shown, keep=True)
        if self._eye is not None and aims.natural:
            odds = self._eye(outside)
            unnatural = F.relu(_NATURAL - odds).sum()
            toward = toward + aims.natural * _uphill(unnatural, shown)
            figures[f"{kind}natural"] = odds.sigmoid().mean()
        return toward, figures

    def mistakes(
        self, real: torch.Tensor, drawn: torch.Tensor, masks: torch.Tensor
    ) -> torch.Tensor:
        """The critic's loss on real and drawn faces, both [B, 3, S, S], within [B, 1, S, S]."""
        faces = torch.cat([real, drawn.detach()])
        with torch.no_grad(), mixed_precision(self._device):
            features, _ = self._see(self._recognizer, faces)
        features = [*features, *self._outside(faces)]
        with mixed_precision(self._device):
            verdicts = [score.chunk(2) for score in self._scored(faces, features)]
        return hinge([r for r, _ in verdicts], [d for _, d in verdicts], self._over(masks))

    def _over(self, masks: torch.Tensor) -> list[torch.Tensor]:
        """For every score map of the critic, the masks of what it saw, weighed by regard."""
        masks = masks * self._regard
        return [*[masks] * 2, *[masks[:, :, self._seen, self._seen]] * len(self.critic.heads)]

    def _judge(
        self, image: torch.Tensor, outside: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        features, embedding = look(self._recognizer, image)
        return self.critic(image, [*features, *outside]), embedding

    def _outside(self, image: torch.Tensor) -> list[torch.Tensor]:
        """What the teacher sees, if there is one."""
        return self._teacher.features(image) if self._teacher else []
