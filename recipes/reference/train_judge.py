"""Train judges of drawn faces on grades that were given by eye; one joins a bundle, one teaches.

    python recipes/reference/train_judge.py --work .work/reference --teacher TEACHER.pt
    python recipes/reference/train_judge.py --bundle BUNDLE -o BUNDLE --force    # into a bundle

Needs `recognizer.pt`, `grades.json` beside this script, and the faces that draw_for_grading.py
drew. Small heads upon a frozen recognizer's features learn the mean grade of a face. The bundle's
judge, `judge.pt`, sees with the bundle's recognizer; the eye, `eye.pt`, which train_stranger.py
asks, with the teacher, whose features tell grades better. Faces of one row in five of the training
faces are not learned from: what is printed is measured on them. With --all the judges that are
written learned from those as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from common import load_recognizer, load_weights, save_checkpoint
from teacher import Teacher

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil_export.judge import add_judge
from diffveil_export.reference.judge import FaceJudge, GradeHeads
from diffveil_export.reference.recognizer import FaceRecognizer

_GRADES = Path(__file__).with_name("grades.json")
_BEST = 2  # the highest grade
_BROKEN = 0.25  # mean grade, as a share of the best, at which a face counts as broken

Views = list[list[torch.Tensor]]
"""Feature maps [N, C, s, s] of faces, and those of the mirrored ones."""


@dataclass(frozen=True)
class Graded:
    """Drawn faces, float16 [N, 3, 128, 128]; mean grades, 0 … 1, and which are held out, [N]."""

    faces: torch.Tensor
    grades: torch.Tensor
    held_out: np.ndarray


def load_graded(work: Path, file: Path) -> Graded:
    """Faces that have grades.

    Raises:
        SystemExit: Faces were drawn by something else than what was graded.
    """
    parts: dict[str, list[np.ndarray]] = {"drawn": [], "rows": []}
    means = []
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
        mean = np.nansum(given, 0) / np.maximum(counted, 1) / _BEST
        mean[counted == 0] = np.nan
        for name, part in parts.items():
            part.append(np.concatenate([d[name] for d in drawn])[: len(mean)])
        means.append(mean[: len(parts["rows"][-1])])
    if not means:
        sys.exit("no graded faces: run draw_for_grading.py first")
    grades = np.concatenate(means)
    known = ~np.isnan(grades)
    faces, rows = (np.concatenate(part)[known] for part in parts.values())
    graded = torch.from_numpy(grades[known]).float()
    return Graded(torch.from_numpy(faces), graded, rows % 5 == 0)


def load_judge(work: Path) -> FaceJudge:
    """The judge that training left, ready to be asked."""
    judge = FaceJudge(load_recognizer(work).fuse())
    judge.heads.load_state_dict(load_weights(work / "judge.pt"))
    return judge.eval().requires_grad_(False)


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


def learned(
    name: str,
    see: Callable[[torch.Tensor], list[torch.Tensor]],
    graded: Graded,
    steps: int,
    *,
    everything: bool,
) -> GradeHeads:
    """Heads upon what is seen; prints how well they grade faces that they did not learn from."""
    seen, held = views(see, graded.faces), torch.from_numpy(graded.held_out)
    heads = trained(seen, graded.grades, np.flatnonzero(~graded.held_out), steps)
    with torch.no_grad():
        scores = heads([maps[held] for maps in seen[0]]).numpy()
    wish = graded.grades[held].numpy()
    broken = wish <= _BROKEN
    kept = scores > np.quantile(scores, 0.25)
    print(
        f"{name}: area {area(-scores, broken):.3f}, correlation"
        f" {np.corrcoef(scores, wish)[0, 1]:.3f}, broken {broken.mean():.3f}, of the upper three"
        f" quarters {broken[kept].mean():.3f}; {len(wish)} faces",
        flush=True,
    )
    return trained(seen, graded.grades, np.arange(len(held)), steps) if everything else heads


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
    parser.add_argument("--grades", type=Path, default=_GRADES)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--all", action="store_true", help="learn from the held-out fifth as well")
    parser.add_argument("--teacher", type=Path, help="TorchScript recognizer: train the eye too")
    parser.add_argument("--bundle", default="runtime/diffveil/bundles/reference-128")
    parser.add_argument("-o", "--output", type=Path, help="bundle to write, with the judge in it")
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there")
    args = parser.parse_args()

    graded = load_graded(args.work, args.grades)
    if args.teacher:
        see = Teacher(args.teacher).features
        eye = learned("eye", see, graded, args.steps, everything=args.all)
        save_checkpoint(args.work / "eye.pt", eye.state_dict())
    bundle = Bundle.load(args.bundle) if args.output else None
    recognizer = load_recognizer(args.work).fuse()
    if bundle is not None and not same(recognizer, bundle):
        sys.exit(f"{args.work}/recognizer.pt is not the recognizer of {args.bundle}: unpack.py")
    judge = FaceJudge(recognizer)
    judge.heads = learned("judge", judge.features, graded, args.steps, everything=args.all)
    save_checkpoint(args.work / "judge.pt", judge.heads.state_dict())
    if bundle is not None:
        count = len(graded.grades) if args.all else int((~graded.held_out).sum())
        origin = f"recipes/reference: {count} drawn faces that were graded by eye"
        judged = add_judge(bundle, judge.fuse(), args.output, origin=origin, force=args.force)
        print(f"wrote {judged.path}: {origin}")


if __name__ == "__main__":
    main()
