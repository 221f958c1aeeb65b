"""Train what sees where drawn faces have their eyes, noses and mouths: train_stranger.py asks it.

    python recipes/reference/train_reader.py --work .work/reference --minutes 4 --teacher TEACHER.pt

It sees with the teacher, and learns from what the detector finds in the training photos. Writes
`reader.ckpt`, a checkpoint; `reader.pt`; and `landmarks.npy`, what the detector found.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    Average,
    Clock,
    Run,
    adamw,
    backward,
    load_faces,
    load_weights,
    save_checkpoint,
    training_arguments,
)
from landmarks import Finder, Reader
from teacher import FRAME, Teacher
from train_diffusion import crop

_SHIFT = 10  # pixels that faces are moved by, at most
_HELD_OUT = 50  # one face in so many is measured on


def load_reader(work: Path, teacher: Teacher) -> Reader:
    """The reader that this script left, which sees with the teacher."""
    reader = Reader([width for width, _ in teacher.shapes], FRAME).to(teacher.device)
    reader.load_state_dict(load_weights(work / "reader.pt"))
    return reader.eval().requires_grad_(False)


def main() -> None:
    parser = training_arguments(__doc__, minutes=4, batch=32, rate=3e-3)
    parser.add_argument("--teacher", type=Path, required=True, help="TorchScript recognizer")
    args = parser.parse_args()
    data, rng = load_faces(args.work), np.random.default_rng(0)
    teacher = Teacher(args.teacher, args.device)
    reader = Reader([width for width, _ in teacher.shapes], FRAME).to(args.device)
    average, optimizer = Average(reader, 0.99), adamw(reader, 1e-3)
    parts = {"network": reader, "average": average.network, "optimizer": optimizer}
    run = Run(args.work / "reader.ckpt", parts, Clock(args.minutes, args.rate))

    fixed = Finder(data, np.zeros((len(data), 2, 2), np.int64), args.work)
    found = np.array([fixed.landmarks(row, 0) is not None for row in range(len(data))])
    known, kept = np.flatnonzero(found), np.arange(len(data)) % _HELD_OUT == 0
    learning, measured = known[~kept[known]], known[kept[known]]

    def batch(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        flips = rng.integers(0, 2, len(rows))
        offsets = np.zeros((len(data), 2, 2), np.int64)
        offsets[rows] = rng.integers(-_SHIFT, _SHIFT + 1, (len(rows), 2, 2))
        finder = fixed.cut(offsets)
        aims = [finder.landmarks(int(r), int(f)) for r, f in zip(rows, flips, strict=True)]
        images = crop(data, rows, flips, offsets).to(args.device)
        return images, torch.from_numpy(np.stack(aims)).float().to(args.device)  # type: ignore[arg-type]

    def distance(network: Reader, images: torch.Tensor, aims: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = teacher.features(images)
        return (network(features) - aims).square().sum(-1).add(0.01).sqrt()

    while run.begin_step(optimizer):
        loss = distance(reader, *batch(rng.choice(learning, args.batch, replace=False))).mean()
        backward(loss, optimizer, reader)
        average.update(reader, run.step)
        run.step += 1
        if run.step % 50 == 0:
            with torch.no_grad():
                off = distance(average.network, *batch(rng.choice(measured, 64, replace=False)))
            run.log(loss=float(loss.detach()), held_out=float(off.mean()), worst=float(off.max()))
            run.save()
    run.save()
    save_checkpoint(args.work / "reader.pt", average.network.state_dict())


if __name__ == "__main__":
    main()
