"""Train a judge of drawn faces on grades that were given by eye, and let it join a bundle.

    python recipes/reference/train_judge.py --work .work/reference --minutes 40
    python recipes/reference/train_judge.py --bundle BUNDLE -o BUNDLE --force    # into a bundle

Needs `recognizer.pt`, `grades.json` beside this script, and the faces that draw_for_grading.py
drew. The lower part of the recognizer, and a few layers upon it, learn the mean grade of a face;
besides, that photographed faces are good, and that any face looks worse once it is spoiled on
purpose (damage.py). Faces of one row in
five of the training faces are not trained on: what is printed of the judge is measured on them.
Writes `judge.ckpt`, a checkpoint, and `judge.pt`; with -o, a copy of a bundle with the judge in it.
Without a checkpoint a `judge.pt` that is there is gone on from; --keep then mixes its weights with
what they became, which ranks faces better than either (Wortsman et al., arXiv 2109.01903).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    Average,
    Clock,
    Run,
    load_recognizer,
    load_weights,
    save_checkpoint,
    training_arguments,
)
from damage import spoiled

from diffveil.bundle import Bundle
from diffveil_export.judge import add_judge
from diffveil_export.reference.judge import FaceJudge

_GRADES = Path(__file__).with_name("grades.json")
_BEST = 2  # the highest grade
_FRAME = slice(8, 120)  # ArcFace's framing in a crop
_BROKEN = 0.25  # mean grade, as a share of the best, at which a face counts as broken


@dataclass(frozen=True)
class Graded:
    """Drawn faces, float16 [N, 3, 128, 128]; mean grades, 0 … 1, and which are held out, [N].

    And what the autoencoder makes of the photos' own faces, as many.
    """

    faces: torch.Tensor
    own: torch.Tensor
    grades: torch.Tensor
    held_out: np.ndarray


def load_graded(work: Path, file: Path) -> Graded:
    """Faces that have grades.

    Raises:
        SystemExit: Faces were drawn by something else than what was graded.
    """
    parts: dict[str, list[np.ndarray]] = {"drawn": [], "own": [], "rows": []}
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
    faces, own, rows = (np.concatenate(part)[known] for part in parts.values())
    return Graded(
        torch.from_numpy(faces),
        torch.from_numpy(own),
        torch.from_numpy(grades[known]).float(),
        rows % 5 == 0,
    )


def new_judge(work: Path) -> FaceJudge:
    """A judge that knows what the recognizer's lower layers know, and no more."""
    judge = FaceJudge()
    judge.begin_with(load_recognizer(work).fuse())
    return judge


def load_judge(work: Path) -> FaceJudge:
    """The judge that training left."""
    judge = new_judge(work)
    judge.load_state_dict(load_weights(work / "judge.pt"))
    return judge


@torch.no_grad()
def settle(judge: FaceJudge, faces: torch.Tensor) -> None:
    """Let batch normalisations normalise what faces [B, 3, 128, 128] bring; grades stay.

    In one that was taken out of a bundle they do nothing but add, and training would start anew.
    """
    x = judge.trunk(faces.float()[:, :, _FRAME, _FRAME])
    layers: list[Any] = [layer for layer in judge.body if hasattr(layer, "norm")]
    for layer in layers:
        norm, x = layer.norm, layer.conv(x)
        variance, mean = torch.var_mean(x, (0, 2, 3))
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias.add_(gain * (mean - norm.running_mean))
        norm.weight.copy_(gain * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        settled = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        x = F.silu(F.batch_norm(x, *settled, eps=norm.eps))


def varied(faces: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """The framing [B, 3, 112, 112] of crops, some mirrored, moved a little, brighter or darker."""
    x = faces.float()
    x = x.flip(3) if rng.random() < 0.5 else x
    gain = torch.from_numpy(rng.uniform(0.8, 1.2, (len(x), 1, 1, 1))).float()
    tint = torch.from_numpy(rng.normal(0, 0.05, (len(x), 3, 1, 1))).float()
    shift = int(rng.integers(-2, 3)), int(rng.integers(-2, 3))
    return torch.roll(x * gain + tint, shift, (2, 3))[:, :, _FRAME, _FRAME]


def framed(judge: FaceJudge, frames: torch.Tensor) -> torch.Tensor:
    """Log-odds of framings, which the judge would cut out of crops itself."""
    return judge.logits(F.pad(frames, (judge.margin,) * 4))


@torch.no_grad()
def grade(judge: FaceJudge, faces: torch.Tensor) -> np.ndarray:
    """Naturalness [N] of crops."""
    return torch.cat([judge(part.float()) for part in torch.split(faces, 64)]).numpy()


def area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive outscores a negative."""
    ranks = scores.argsort().argsort()
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count - 1) / 2) / (count * (~positive).sum()))


def main() -> None:
    parser = training_arguments(__doc__, minutes=40, batch=24, rate=2e-3)
    parser.add_argument("--grades", type=Path, default=_GRADES)
    parser.add_argument("--trunk-pace", type=float, default=0.15, help="its share of the rate")
    parser.add_argument("--keep", type=float, default=0.0, help="share of judge.pt's weights kept")
    parser.add_argument("--all", action="store_true", help="train on the held-out fifth as well")
    parser.add_argument("--bundle", default="runtime/diffveil/bundles/reference-128")
    parser.add_argument("-o", "--output", type=Path, help="bundle to write, with the judge in it")
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there")
    args = parser.parse_args()

    graded = load_graded(args.work, args.grades)
    judge = new_judge(args.work)
    average = Average(judge, 0.99)
    trunk = list(judge.trunk.parameters())
    rest = [p for name, p in judge.named_parameters() if not name.startswith("trunk.")]
    groups = [{"params": trunk, "pace": args.trunk_pace}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    parts = {"network": judge, "average": average.network, "optimizer": optimizer}
    run = Run(args.work / "judge.ckpt", parts, Clock(args.minutes, args.rate))
    rng = np.random.default_rng(time.time_ns())
    if run.step == 0 and (args.work / "judge.pt").exists():
        for network in (judge, average.network):
            settle(network, graded.faces[:128])
    held = graded.held_out & (not args.all)
    print(f"{(~held).sum()} graded faces to train on, {held.sum()} held out", flush=True)

    def report() -> None:
        if not held.any():
            return
        seen = grade(average.network, graded.faces[torch.from_numpy(held)])
        wish = graded.grades[torch.from_numpy(held)].numpy()
        broken = wish <= _BROKEN
        kept = seen > np.quantile(seen, 0.25)
        run.log(
            area=area(-seen, broken),
            correlation=float(np.corrcoef(seen, wish)[0, 1]),
            broken=float(broken.mean()),
            broken_without_worst_quarter=float(broken[kept].mean()),
        )

    rows, spare = np.flatnonzero(~held), args.batch // 6
    order: list[int] = []
    while run.begin_step(optimizer):
        if len(order) < args.batch:
            order = rng.permutation(rows).tolist()
        mine = torch.tensor([order.pop() for _ in range(args.batch)])
        some, others, real = (torch.from_numpy(rng.choice(rows, spare)) for _ in range(3))
        whole = varied(torch.cat([graded.faces[some], graded.own[real]]), rng)
        worse = spoiled(whole, graded.faces[torch.cat([others, real])][..., _FRAME, _FRAME], rng)
        logits = framed(judge, torch.cat([varied(graded.faces[mine], rng), whole, worse]))
        given, better, lesser = torch.split(logits, [args.batch, 2 * spare, 2 * spare])
        fit = F.binary_cross_entropy_with_logits(given, graded.grades[mine])
        order_kept = F.softplus(lesser - better).mean()
        photographed = F.softplus(-better[spare:]).mean()
        optimizer.zero_grad()
        (fit + 0.3 * order_kept + 0.1 * photographed).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 2.0)
        optimizer.step()
        average.update(judge, run.step)
        run.step += 1
        if run.step % 50 == 0:
            run.log(fit=fit.item(), order=order_kept.item(), own=photographed.item())
        if run.step % 200 == 0:
            run.save()
            report()
    run.save()
    finished = args.work / "judge.pt"
    if args.keep and finished.exists():
        kept = load_judge(args.work)
        settle(kept, graded.faces[:128])
        average.mix(kept.state_dict(), args.keep)
    report()
    save_checkpoint(finished, average.network.state_dict())
    if args.output:
        faces = f"{len(rows)} drawn faces"
        origin = f"recipes/reference: {run.step} steps on {faces} that were graded by eye"
        judged = add_judge(
            Bundle.load(args.bundle),
            average.network.fuse(),
            args.output,
            origin=origin,
            force=args.force,
        )
        print(f"wrote {judged.path}: {origin}")


if __name__ == "__main__":
    main()
