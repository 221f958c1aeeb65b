"""Train judges of drawn faces on grades that were given by eye; one joins a bundle, one teaches.

    python recipes/reference/train_judge.py --work .work/reference --minutes 12 --teacher TEACHER.pt
    python recipes/reference/train_judge.py --bundle BUNDLE -o BUNDLE --force    # into a bundle

Needs `recognizer.pt`, `grades.json` beside this script, and the faces that draw_for_grading.py
drew. Small heads upon a frozen recognizer's features learn the mean grade of a face: upon the
teacher's they are the eye, `eye.pt`, which train_stranger.py asks; upon those of the bundle's
recognizer they become the judge, whose copy of the recognizer then learns along for --minutes.
It learns as well what others say that saw the other half of the photos, eyes if there is a teacher:
a grade is one opinion, and these say what grades have in common. Writes `judge.pt`, and
`judge-training.ckpt`, a checkpoint, which is gone on from. Faces of one row in five of the training
faces are not learned from: what is printed is measured on them, of eye and heads by those others
that saw half. With --all what is written learned from them as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    Clock,
    Run,
    backward,
    load_recognizer,
    load_weights,
    mixed_precision,
    save_checkpoint,
)
from teacher import Teacher

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil_export.judge import add_judge
from diffveil_export.reference.judge import FaceJudge, GradeHeads
from diffveil_export.reference.recognizer import FaceRecognizer

_GRADES = Path(__file__).with_name("grades.json")
_BEST = 2  # the highest grade, where the file names no other
_HEARSAY = 0.4  # share of what others say of a face in what the judge is to think of it
_BROKEN = 0.25  # mean grade, as a share of the best, at which a face counts as broken

Views = list[list[torch.Tensor]]
"""Feature maps [N, C, s, s] of faces, and those of the mirrored ones."""


@dataclass(frozen=True)
class Graded:
    """Drawn faces, their grades, and whose they are.

    Attributes:
        faces: Float16 [N, 3, 128, 128] in [-1, 1].
        grades: Mean grades, float32 [N], 0 … 1.
        rows: Training faces whose place they take, int [N].
        sheets: Numbers of the folders that they were drawn into, int [N].
    """

    faces: torch.Tensor
    grades: torch.Tensor
    rows: np.ndarray
    sheets: np.ndarray

    @property
    def held_out(self) -> np.ndarray:
        """Which are only measured on, bool [N]."""
        left_out: np.ndarray = self.rows % 5 == 0
        return left_out

    @property
    def photos(self) -> np.ndarray:
        """The same number for all draws of one photo into one folder, int [N]."""
        both = np.stack([self.sheets, self.rows])
        numbers: np.ndarray = np.unique(both, axis=1, return_inverse=True)[1]
        return numbers


def load_graded(work: Path, file: Path) -> Graded:
    """Faces that have grades.

    Raises:
        SystemExit: Faces were drawn by something else than what was graded.
    """
    parts: dict[str, list[np.ndarray]] = {"drawn": [], "rows": []}
    means: list[np.ndarray] = []
    sheets: list[np.ndarray] = []
    for entry in json.loads(file.read_text()):
        facts, strings = entry["drawn"], entry["grades"]
        folder = work / "grading" / f"{facts['verb']}-{facts['seed']}"
        if not folder.exists():
            print(f"{folder} is missing: its grades are left out", flush=True)
            continue
        if json.loads((folder / "drawn.json").read_text()) != facts:
            sys.exit(f"{folder} was drawn by other weights or another plan than what was graded")
        drawn = [np.load(file) for file in sorted(folder.glob("*.npz"))]
        given = np.array([[float(c) if c.isdigit() else np.nan for c in s] for s in strings])
        counted = (~np.isnan(given)).sum(0)
        mean = np.nansum(given, 0) / np.maximum(counted, 1) / entry.get("best", _BEST)
        mean[counted == 0] = np.nan
        if "level" in entry:  # graders compare: among their like, better faces get the same grades
            mean = np.clip(mean + entry["level"] - np.nanmean(mean), 0, 1)
        for name, part in parts.items():
            part.append(np.concatenate([d[name] for d in drawn])[: len(mean)])
        sheets.append(np.full(len(parts["rows"][-1]), len(sheets)))
        means.append(mean[: len(parts["rows"][-1])])
    if not means:
        sys.exit("no graded faces: run draw_for_grading.py first")
    grades = np.concatenate(means)
    known = ~np.isnan(grades)
    faces, rows = (np.concatenate(part)[known] for part in parts.values())
    graded = torch.from_numpy(grades[known]).float()
    return Graded(torch.from_numpy(faces), graded, rows, np.concatenate(sheets)[known])


def load_eye(work: Path, teacher: Teacher) -> GradeHeads:
    """The eye that training left, ready to be asked."""
    eye = GradeHeads([width for width, _ in teacher.shapes])
    eye.load_state_dict(load_weights(work / "eye.pt"))
    return eye.eval().requires_grad_(False)


@torch.no_grad()
def views(see: Callable[[torch.Tensor], list[torch.Tensor]], faces: torch.Tensor) -> Views:
    """What is seen, in float16, of faces [N, 3, 128, 128] and of their mirror images."""
    both = []
    for turned in (faces, faces.flip(3)):
        parts = [[f.half() for f in see(part.float())] for part in torch.split(turned, 64)]
        both.append([torch.cat(maps) for maps in zip(*parts, strict=True)])
    return both


def trained(seen: Views, grades: torch.Tensor, rows: np.ndarray, steps: int) -> GradeHeads:
    """Heads that learned the grades [N], 0 … 1, of the faces in `rows`."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    heads = GradeHeads([maps.shape[1] for maps in seen[0]])
    heads.measure([maps[rows[::4]].float() for maps in seen[0]])
    optimizer = torch.optim.AdamW(heads.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        some = torch.from_numpy(rng.choice(rows, 64))
        view = seen[int(rng.integers(len(seen)))]
        opinions = heads.opinions([maps[some] for maps in view])
        wish = grades[some].expand_as(opinions)
        loss = F.binary_cross_entropy_with_logits(opinions, wish) * len(opinions)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return heads.eval()


def area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive outscores a negative."""
    ranks = scores.argsort().argsort()
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count - 1) / 2) / (count * (~positive).sum()))


def within(scores: np.ndarray, grades: np.ndarray, photos: np.ndarray) -> float:
    """Correlation of scores and grades among draws of one photo; NaN where no two are of one."""
    _, photo, count = np.unique(photos, return_inverse=True, return_counts=True)
    several = count[photo] > 1

    def apart(values: np.ndarray) -> np.ndarray:
        """Less their photo's mean."""
        return (values - (np.bincount(photo, values) / count)[photo])[several]

    return float(np.corrcoef(apart(scores), apart(grades))[0, 1]) if several.any() else np.nan


def report(name: str, scores: np.ndarray, graded: Graded) -> None:
    """Print how well scores [N] order faces of which none was learned from."""
    held = graded.held_out
    wish, scores, photos = graded.grades.numpy()[held], scores[held], graded.photos[held]
    broken = wish <= _BROKEN
    kept = scores > np.quantile(scores, 0.25)
    print(
        f"{name}: area {area(-scores, broken):.3f}, correlation"
        f" {np.corrcoef(scores, wish)[0, 1]:.3f}, among draws of one photo"
        f" {within(scores, wish, photos):.3f}, broken {broken.mean():.3f}, of the upper three"
        f" quarters {broken[kept].mean():.3f}; {len(wish)} faces",
        flush=True,
    )


@torch.no_grad()
def opinions(heads: GradeHeads, seen: Views) -> np.ndarray:
    """Naturalness, 0 … 1, of faces and their mirror images taken together: float32 [N]."""
    odds = [
        torch.cat([heads(part) for part in zip(*(torch.split(m, 256) for m in maps), strict=True)])
        for maps in seen
    ]
    both: np.ndarray = torch.stack(odds).mean(0).sigmoid().numpy()
    return both


def learned(
    name: str, seen: Views, graded: Graded, rows: np.ndarray, steps: int
) -> tuple[GradeHeads, np.ndarray]:
    """Heads upon what is seen, that learned from `rows`, and what others say of every face.

    Two other heads each learned from the photos of one half, and speak about the other half.
    """
    heads = trained(seen, graded.grades, rows, steps)
    half = graded.rows % 2
    said = np.empty(len(half), np.float32)
    for side in (0, 1):
        other = trained(seen, graded.grades, rows[half[rows] != side], steps)
        said[half == side] = opinions(other, seen)[half == side]
    report(name, said, graded)
    return heads, said


class Lesson:
    """What is learned from, as a part of a checkpoint: it must not change on the way."""

    def __init__(self, graded: Graded, rows: np.ndarray, *, heard_teacher: bool) -> None:
        arrays = (graded.grades.numpy(), graded.rows, graded.sheets, rows)
        text = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
        self._digest = hashlib.sha256(text + bytes([heard_teacher])).hexdigest()

    def state_dict(self) -> dict[str, str]:
        """Its digest."""
        return {"digest": self._digest}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Compare digests.

        Raises:
            SystemExit: The checkpoint is about other faces or grades.
        """
        if state != self.state_dict():
            sys.exit(
                "judge-training.ckpt learned from other faces, grades or a teacher that is not "
                "here: put it aside"
            )


def learn_along(
    judge: FaceJudge,
    graded: Graded,
    wish: torch.Tensor,
    rows: np.ndarray,
    run: Run,
    optimizer: torch.optim.Optimizer,
    batch: int,
) -> None:
    """Train all of a judge on faces `rows` that are shifted, mirrored and lit at random.

    Args:
        judge: Heads that have learned, and what they see with.
        graded: The faces.
        wish: Naturalness that they are to have, [N], 0 … 1.
        rows: Those to learn from.
        run: Says how long.
        optimizer: Of the judge's parameters.
        batch: Faces a step.
    """
    rng = np.random.default_rng(run.step)
    several = np.bincount(graded.photos)[graded.photos[rows]] > 1  # these tell draws apart
    likely = (1.0 + several) / (1.0 + several).sum()
    losses: list[float] = []
    judge.requires_grad_(True).train()
    while run.begin_step(optimizer):
        some = torch.from_numpy(rng.choice(rows, batch, p=likely))
        faces = graded.faces[some].float()
        if rng.random() < 0.5:
            faces = faces.flip(3)
        faces = faces.roll(tuple(rng.integers(-3, 4, 2).tolist()), (2, 3))
        faces = faces * rng.uniform(0.85, 1.15) + rng.uniform(-0.1, 0.1)
        with mixed_precision("cpu"):
            maps = judge.features(faces.contiguous(memory_format=torch.channels_last))
        odds = judge.heads.opinions([m.float() for m in maps])
        loss = F.binary_cross_entropy_with_logits(odds, wish[some].expand_as(odds)) * len(odds)
        backward(loss, optimizer, judge)
        losses.append(loss.item() / len(odds))
        run.step += 1
        if run.step % 100 == 0:
            run.log(loss=float(np.mean(losses[-100:])))
        if run.step % 500 == 0:
            run.save()
    run.save()
    judge.requires_grad_(False).eval()


@torch.no_grad()
def same(recognizer: FaceRecognizer, bundle: Bundle) -> bool:
    """Whether a recognizer sees what the bundle's sees, but for rounding."""
    faces = np.random.default_rng(0).uniform(-1, 1, (4, 3, 128, 128)).astype(np.float32)
    with Programs(bundle, ONNXRuntimeCPU()) as programs:
        expected = programs.recognize(image=faces)
    cosines = (recognizer(torch.from_numpy(faces)).numpy() * expected).sum(1)
    return bool((cosines > 0.99).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(".work/reference"))
    parser.add_argument("--minutes", type=float, default=12, help="of heads and recognizer")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--grades", type=Path, default=_GRADES)
    parser.add_argument("--steps", type=int, default=2000, help="of the heads alone")
    parser.add_argument("--all", action="store_true", help="learn from the held-out fifth as well")
    parser.add_argument("--teacher", type=Path, help="TorchScript recognizer: train the eye too")
    parser.add_argument("--bundle", default="runtime/diffveil/bundles/reference-128")
    parser.add_argument("-o", "--output", type=Path, help="bundle to write, with the judge in it")
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there")
    args = parser.parse_args()

    graded = load_graded(args.work, args.grades)
    rows = np.flatnonzero(np.ones(len(graded.rows), bool) if args.all else ~graded.held_out)
    others: np.ndarray | None = None
    if args.teacher:
        seen = views(Teacher(args.teacher).features, graded.faces)
        eye, others = learned("eye", seen, graded, rows, args.steps)
        save_checkpoint(args.work / "eye.pt", eye.state_dict())
        del seen
    bundle = Bundle.load(args.bundle) if args.output else None
    recognizer = load_recognizer(args.work).fuse()
    if bundle is not None and not same(recognizer, bundle):
        sys.exit(f"{args.work}/recognizer.pt is not the recognizer of {args.bundle}: unpack.py")
    judge = FaceJudge(recognizer)
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    judge.heads, said = learned(
        "heads", views(judge.features, graded.faces), graded, rows, args.steps
    )
    heard = torch.from_numpy(said if others is None else others)
    wish = (1 - _HEARSAY) * graded.grades + _HEARSAY * heard
    groups = [
        {"params": judge.trunk.parameters(), "weight_decay": 0.05},
        {"params": judge.heads.parameters(), "weight_decay": 0.1, "pace": 2.5},
    ]
    optimizer = torch.optim.AdamW(groups)
    clock = Clock(args.minutes, args.rate)
    lesson = Lesson(graded, rows, heard_teacher=args.teacher is not None)
    parts = {"lesson": lesson, "network": judge, "optimizer": optimizer}
    run = Run(args.work / "judge-training.ckpt", parts, clock)
    learn_along(judge, graded, wish, rows, run, optimizer, args.batch)
    if not args.all:
        with torch.no_grad():
            scores = [judge(part.float()) for part in torch.split(graded.faces, 64)]
        report("judge", torch.cat(scores).numpy(), graded)
    save_checkpoint(args.work / "judge.pt", judge.state_dict())
    if bundle is not None:
        origin = f"recipes/reference: {len(rows)} drawn faces that were graded by eye"
        judged = add_judge(
            bundle, judge.fuse(), args.output, origin=origin, weights="int4", force=args.force
        )
        print(f"wrote {judged.path}: {origin}")


if __name__ == "__main__":
    main()
