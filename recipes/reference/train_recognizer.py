"""Distil a face recognizer: the student's embedding follows the teacher's on every training face.

    python recipes/reference/train_recognizer.py --work .work/reference --minutes 30 \\
        --teacher TEACHER.pt

The teacher is a TorchScript module: RGB 0…255 [B, 3, 112, 112], ArcFace-aligned, to unit
embeddings.
Its targets (mean over a face and its mirror image) are computed once and kept in `teacher.npy`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    CROP,
    Average,
    Clock,
    Run,
    adamw,
    backward,
    load_faces,
    mixed_precision,
    place,
    save_checkpoint,
    to_unit,
    training_arguments,
)

from diffveil_export.reference.recognizer import FaceRecognizer


def teacher_targets(faces: np.ndarray, teacher: Path, work: Path, device: str) -> torch.Tensor:
    """Unit embeddings [N, E] of all training faces, cached beside them."""
    path = work / "teacher.npy"
    if path.exists():
        return torch.from_numpy(np.load(path))
    load: Any = torch.jit.load  # has no types
    network = torch.jit.freeze(load(teacher, map_location=device).eval())
    rows = []
    started = time.monotonic()
    with torch.no_grad(), mixed_precision(device):
        for start in range(0, len(faces), 128):
            crop = torch.from_numpy(faces[start : start + 128, 24:136, 24:136].copy())
            image = crop.permute(0, 3, 1, 2).float().to(device, memory_format=torch.channels_last)
            embedding = network(image).float() + network(image.flip(3)).float()
            rows.append(F.normalize(embedding, dim=1).cpu())
            if start % 2560 == 0:
                print(
                    f"teacher {start}/{len(faces)} {time.monotonic() - started:.0f} s", flush=True
                )
    targets = torch.cat(rows)
    np.save(path, targets.numpy())
    return targets


def augment(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Small misalignment, exposure, blur and noise, each face its own.

    Faces [B, 3, 160, 160] → crops [B, 3, 128, 128], both in [-1, 1].
    """
    n = image.shape[0]

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    angle, scale = uniform(-0.09, 0.09), CROP / 160 * uniform(0.94, 1.06)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack(
        [torch.stack([cos * mirror, -sin, uniform(-0.04, 0.04)], 1),
         torch.stack([sin * mirror, cos, uniform(-0.04, 0.04)], 1)], 1)  # fmt: skip
    grid = F.affine_grid(matrix, [n, 3, CROP, CROP], align_corners=False).to(image.device)
    crop = F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
    gain, bias = uniform(0.75, 1.25), uniform(-0.15, 0.15)
    crop = crop * gain.view(-1, 1, 1, 1).to(crop) + bias.view(-1, 1, 1, 1).to(crop)
    blurred = F.avg_pool2d(crop, 3, 1, 1, count_include_pad=False)
    share = (uniform(-1, 1).clamp(min=0)).view(-1, 1, 1, 1).to(crop)
    crop = torch.lerp(crop, blurred, share)
    amount = (uniform(-0.1, 0.1).clamp(min=0)).view(-1, 1, 1, 1).to(crop)
    crop = crop + amount * torch.randn(crop.shape, generator=generator).to(crop)
    return crop.clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def main() -> None:
    parser = training_arguments(__doc__, minutes=15, batch=64, rate=2e-3)
    parser.add_argument("--teacher", type=Path, required=True)
    args = parser.parse_args()

    faces = load_faces(args.work)
    targets = teacher_targets(faces, args.teacher, args.work, args.device)
    rng = np.random.default_rng(time.time_ns())
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    network = place(FaceRecognizer(embedding=targets.shape[1]), args.device)
    average = Average(network, 0.998)
    optimizer = adamw(network, 2e-2)
    parts = {"network": network, "average": average.network, "optimizer": optimizer}
    clock = Clock(args.minutes, args.rate, floor=1e-6)
    run = Run(args.work / "recognizer.ckpt", parts, clock)

    order: list[int] = []
    while run.begin_step(optimizer):
        if len(order) < args.batch:
            order = rng.permutation(len(faces)).tolist()
        rows = np.sort([order.pop() for _ in range(args.batch)])
        image = augment(to_unit(faces[rows]).to(args.device), generator)
        target = targets[rows].to(args.device)
        with mixed_precision(args.device):
            output = network(image)
        output = output.float()
        point = (1 - (output * target).sum(1)).mean()
        # Distances between faces matter more than their coordinates: match Gram matrices too.
        relation = (output @ output.T - target @ target.T).square().mean().sqrt()
        backward(point + relation, optimizer, network)
        average.update(network, run.step)
        run.step += 1
        if run.step % 50 == 0:
            run.log(cosine=1 - point.item(), relation=relation.item())
        if run.step % 500 == 0:
            run.save()
    run.save()
    save_checkpoint(args.work / "recognizer.pt", average.network.state_dict())


if __name__ == "__main__":
    main()
