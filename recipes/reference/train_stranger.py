"""Teach the few-step change to draw strangers: along its own guided samples, against a critic.

    python recipes/reference/train_stranger.py --work .work/reference --minutes 60 --compile

Needs `autoencoder.pt`, `diffusion.pt`, `recognizer.pt`, the `latents.npy` that train_diffusion.py
leaves, and a bundle with surrogates (make_surrogates.py) whose guide steers the samples as
anonymize will. Goes on from `few.safetensors` (distill.py). A batch is sampled as anonymize or hide
samples it, up to a step chosen at random; there the predicted clean face is judged, pasted into its
photo:

* a critic on pixels and on features of the frozen recognizer and its teacher tells such faces from
  real ones, so that features are sharp and fit the head around them;
* the recognizer must not take the face for the photo's person, but must if it is hidden;
* an eye that learned from grades (train_judge.py's `eye.pt`) must find it natural;
* the ordinary model's prediction, and the photo's light, hold it where it should be.

Backpropagation goes through the last evaluation only (Clark et al., arXiv 2309.17400, DRaFT-1).
Writes `stranger.ckpt`, a checkpoint; `stranger.safetensors`, the averaged low-rank weights, and
beside every sheet a copy of them for mix_changes.py; `stranger-*.png`, sheets of held-out faces:
photo, then before and now for each plan.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    CROP,
    Average,
    Clock,
    Run,
    autoencoder_file,
    backward,
    chances,
    held_out,
    in_whole_photos,
    load_autoencoder,
    load_change,
    load_faces,
    load_names,
    load_recognizer,
    load_weights,
    mixed_precision,
    place,
    save_change,
    save_sheet,
    training_arguments,
)
from critics import look, regard
from distill import unit
from guided_samples import Faces, Sampler
from judges import Aims, Judges
from landmarks import Finder
from teacher import Teacher
from train_diffusion import Diffusion, crop, encode_all, load_diffusion
from train_judge import load_eye

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.plans import Plan
from diffveil.presets import preset
from diffveil_export.models.low_rank import load_low_rank, low_rank_parameters

_TURNED = 0.2  # eye distances that a nose is beside their middle: one face in nine


def arguments() -> argparse.Namespace:
    parser = training_arguments(__doc__, minutes=60, batch=12, rate=1.5e-3)
    parser.add_argument("--bundle", default="runtime/diffveil/bundles/reference-128")
    parser.add_argument("--few-scale", type=float, default=0.4, help="share of distill.py's change")
    parser.add_argument("--hold", type=float, default=0.2, help="weight of the ordinary prediction")
    parser.add_argument("--adversarial", type=float, default=1.0, help="weight of the critic")
    parser.add_argument("--critic-pace", type=float, default=2.0, help="its share of the rate")
    parser.add_argument("--repel", type=float, default=0.3, help="weight of the recognizers")
    parser.add_argument(
        "--natural", type=float, default=2.0, help="weight of eye.pt, which sees with the teacher"
    )
    parser.add_argument(
        "--turned", type=float, default=0.4, help="share of faces turned aside, about"
    )
    parser.add_argument("--margin", type=float, default=0.0, help="cosine that is strange enough")
    parser.add_argument("--known", type=float, default=0.6, help="cosine that hide is to keep")
    parser.add_argument("--hide", type=float, default=0.4, help="share of batches that are hidden")
    parser.add_argument(
        "--whole", type=float, default=0.5, help="share of faces that stand in whole photos"
    )
    parser.add_argument("--teacher", type=Path, help="TorchScript recognizer: one more judge")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    args = parser.parse_args()
    if args.natural and not (args.teacher and (args.work / "eye.pt").exists()):
        parser.error(
            f"--natural {args.natural} asks {args.work}/eye.pt, which sees with --teacher: train "
            "it (train_judge.py --teacher TEACHER.pt), or give --natural 0"
        )
    return args


def main() -> None:
    args = arguments()
    device = args.device
    aims = Aims(args.adversarial, args.repel, args.margin, args.known, args.natural)

    def wrap(function: Any) -> Any:
        return torch.compile(function, dynamic=False) if args.compile else function

    data = load_faces(args.work)
    vae = place(load_autoencoder(args.work / "autoencoder.pt").eval(), device)
    vae.requires_grad_(False)
    latents, offsets = encode_all(data, args.work, vae, device)
    vae.load_state_dict(load_weights(autoencoder_file(args.work)))
    recognizer = place(load_recognizer(args.work).fuse().requires_grad_(False), device)

    def load() -> Diffusion:
        return place(load_diffusion(args.work).eval().requires_grad_(False), device)

    ordinary, student, before = load(), load().unet, load().unet
    change = load_change(args.work / "few.safetensors", args.few_scale)
    finished = args.work / "stranger.safetensors"
    load_low_rank(before, change)
    load_low_rank(student, load_change(finished) if finished.exists() else change)
    factors = nn.ParameterList(low_rank_parameters(student))
    average = Average(student, 0.997)
    sampler = Sampler(ordinary, Programs(Bundle.load(args.bundle), ONNXRuntimeCPU()), device)
    teacher = Teacher(args.teacher, device) if args.teacher else None
    eye = load_eye(args.work, teacher) if teacher is not None and args.natural else None
    where = regard(sampler.template, CROP)
    judges = Judges(recognizer, device, teacher=teacher, eye=eye, regard=where, wrap=wrap)
    find = Finder(data, offsets, args.work)
    settings: Any = {"betas": (0.0, 0.99), "weight_decay": 1e-3}
    optimizer = torch.optim.AdamW(factors, **settings)
    critic_optimizer = torch.optim.AdamW(judges.critic.parameters(), **settings)
    parts = {
        "network": student,
        "average": average.network,
        "critic": judges.critic,
        "optimizer": optimizer,
        "critic_optimizer": critic_optimizer,
    }
    clock = Clock(args.minutes, args.rate, floor=1e-5)
    run_ = Run(args.work / "stranger.ckpt", parts, clock)
    for group in critic_optimizer.param_groups:
        group["pace"] = args.critic_pace
    rng = np.random.default_rng(time.time_ns())
    likely = chances(in_whole_photos(load_names(args.work)), args.whole)
    likely = likely * chances(find.turned(_TURNED), args.turned)
    likely /= likely.sum()
    some = rng.choice(len(data), 96, replace=False, p=likely)
    judges.measure(crop(data, some, np.zeros(len(some), np.int64), offsets).to(device))
    plans = [preset("fast").anonymize, preset("balanced").anonymize, preset("fast").hide]
    shares = np.array([0.65, 0.35, 0.0]) * (1 - args.hide) + np.array([0.0, 0.0, args.hide])
    tables = [plan.table(sampler.schedule) for plan in plans]
    moved, still, decode = wrap(student), wrap(ordinary.unet), wrap(vae.decode)
    probe = held_out(args.work, 29, 14).to(device)
    looked = [
        find.in_picture(((face + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy())
        for face in probe
    ]

    def faces_of(
        image: torch.Tensor, latent: torch.Tensor, plan: Plan, landmarks: list[np.ndarray | None]
    ) -> Faces:
        with torch.no_grad(), mixed_precision(device):
            tokens = ordinary.conditioner.embed(image).float()
            _, identities = look(recognizer, image)
        apart = plan.guidance.mode == "repel"
        surrogates = sampler.surrogates(tokens, identities, apart=apart)
        masks = sampler.masks(landmarks)
        return Faces(image, latent, tokens, identities, surrogates, *masks)

    def save() -> None:
        run_.save()
        for file in (finished, args.work / f"stranger-{run_.step:06d}.safetensors"):
            save_change(file, average.network)
        rows = [probe]
        with torch.no_grad():
            clean = vae.encode(probe)
            for plan, table in zip(plans, tables, strict=True):
                faces = faces_of(probe, clean, plan, looked)
                guidance = sampler.guidance(faces, plan)
                for unet in (before, average.network):
                    same = np.random.default_rng(0)
                    x = sampler.until(unet, faces, plan, table, guidance, len(table.steps), same)
                    rows.append(sampler.pasted(vae.decode, faces, x))
        save_sheet(args.work / f"stranger-{run_.step:06d}.png", rows)

    figures: dict[str, list[float]] = {}
    while run_.begin_step(optimizer, critic_optimizer):
        rows = np.sort(rng.choice(len(data), 2 * args.batch, replace=False, p=likely))
        flips = rng.integers(0, 2, 2 * args.batch)
        images = crop(data, rows, flips, offsets).to(device, memory_format=torch.channels_last)
        both = torch.from_numpy(latents[rows, flips]).float().to(device)
        order = torch.from_numpy(rng.permutation(2 * args.batch)).to(device)
        mine, others = order[: args.batch], order[args.batch :]
        which = int(rng.choice(len(plans), p=shares))
        plan, table = plans[which], tables[which]
        landmarks = [find.landmarks(int(rows[i]), int(flips[i])) for i in mine]
        faces = faces_of(images[mine], both[mine], plan, landmarks)
        stop = int(rng.integers(len(table.steps)))
        if rng.random() < 0.25:  # what is seen in the end
            stop = len(table.steps) - 1
        step = table.steps[stop]
        guidance = sampler.guidance(faces, plan)
        x = sampler.until(moved, faces, plan, table, guidance, stop, rng)
        with mixed_precision(device):
            predicted = sampler.clean(moved, faces, plan, step, x)
        with torch.no_grad(), mixed_precision(device):
            expected = sampler.clean(still, faces, plan, step, x)
        latent = (predicted.detach() + sampler.nudge(guidance, step, predicted)).requires_grad_()

        with mixed_precision(device):
            image = sampler.pasted(decode, faces, latent)
        hidden = plan.guidance.mode == "attract"
        toward, reached = judges.wish(
            image,
            faces.image,
            faces.identities,
            faces.mask,
            aims,
            hidden=hidden,
            step=run_.step,
        )
        (gradient,) = torch.autograd.grad((image * toward).sum(), latent)
        strength = toward.square().mean((1, 2, 3), keepdim=True).sqrt()
        error = (predicted - expected).detach()
        reach = (error.square().mean((1, 2, 3), keepdim=True) + 0.01).sqrt()
        pull = args.hold * error / reach + strength * unit(gradient)
        backward((predicted * pull).sum() / predicted.numel() * 10, optimizer, factors)
        average.update(student, run_.step)

        with torch.no_grad(), mixed_precision(device):
            theirs = replace(faces, image=images[others], latent=both[others])
            real = sampler.pasted(decode, theirs, theirs.latent)
        loss = judges.mistakes(real, image, faces.mask)
        backward(loss, critic_optimizer, judges.critic)

        run_.step += 1
        reached |= {"moved": error.square().mean().sqrt(), "hinge": loss}
        for name, value in reached.items():
            figures.setdefault(name, []).append(float(value.detach()))
        if run_.step % 25 == 0:
            run_.log(**{k: float(np.mean(v)) for k, v in figures.items()}, minutes=clock.spent / 60)
            figures.clear()
        if run_.step % 100 == 0:
            save()
    save()


if __name__ == "__main__":
    main()
