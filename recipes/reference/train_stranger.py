"""Teach the few-step change to draw strangers: along its own guided samples, against a critic.

    python recipes/reference/train_stranger.py --work .work/reference --minutes 60 --compile

Needs `autoencoder.pt`, `diffusion.pt`, `recognizer.pt`, the `latents.npy` that train_diffusion.py
leaves, and a bundle whose `guide_latent` steers the samples as anonymize will. Goes on from
`few.safetensors` (distill.py). A batch is sampled as anonymize or hide samples it, up to a step
chosen at random; there the predicted clean face is judged, pasted into its photo:

* a critic on pixels and on the frozen recognizer's features tells such faces from real ones, so
  that features are sharp and fit the head around them;
* the recognizer must not take the face for the photo's person, but must if it is hidden;
* the ordinary model's prediction, and the photo's light, hold it where it should be.

Backpropagation goes through the last evaluation only (Clark et al., arXiv 2309.17400, DRaFT-1).
Writes `stranger.ckpt`, a checkpoint; `stranger.safetensors`, the averaged low-rank weights;
`stranger-*.png`, held-out faces: photo, then before and now for each plan.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    Average,
    Clock,
    Run,
    autoencoder_file,
    backward,
    held_out,
    load_autoencoder,
    load_change,
    load_faces,
    load_recognizer,
    load_weights,
    mixed_precision,
    place,
    save_change,
    save_sheet,
    training_arguments,
)
from critics import (
    FEATURES,
    FaceCritic,
    hinge,
    look,
    measure,
    merit,
)
from distill import unit
from guided_samples import Faces, Sampler
from train_diffusion import Diffusion, crop, encode_all, load_diffusion

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.presets import preset
from diffveil_export.models.low_rank import (
    load_low_rank,
    low_rank_parameters,
)


def main() -> None:
    parser = training_arguments(__doc__, minutes=60, batch=12, rate=1.5e-3)
    parser.add_argument("--bundle", default="runtime/diffveil/bundles/reference-128")
    parser.add_argument("--few-scale", type=float, default=0.4, help="share of distill.py's change")
    parser.add_argument("--hold", type=float, default=0.2, help="weight of the ordinary prediction")
    parser.add_argument("--adversarial", type=float, default=1.0)
    parser.add_argument("--critic-pace", type=float, default=2.0, help="its share of the rate")
    parser.add_argument("--repel", type=float, default=0.3)
    parser.add_argument("--margin", type=float, default=0.0, help="cosine that is strange enough")
    parser.add_argument("--known", type=float, default=0.6, help="cosine that hide is to keep")
    parser.add_argument("--hide", type=float, default=0.3, help="share of batches that are hidden")
    parser.add_argument("--teacher", type=Path, help="TorchScript recognizer to please as well")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    args = parser.parse_args()
    device = args.device

    data = load_faces(args.work)
    vae = place(load_autoencoder(args.work / "autoencoder.pt").eval(), device)
    vae.requires_grad_(False)
    latents, offsets = encode_all(data, args.work, vae, device)
    vae.load_state_dict(load_weights(autoencoder_file(args.work)))
    recognizer = place(load_recognizer(args.work).fuse().requires_grad_(False), device)
    outsider: Any = None
    if args.teacher:
        outsider = torch.jit.load(args.teacher).eval().to(device)  # type: ignore[no-untyped-call]

    def load() -> Diffusion:
        return place(load_diffusion(args.work).eval().requires_grad_(False), device)

    ordinary, student, before = load(), load().unet, load().unet
    change = load_change(args.work / "few.safetensors", args.few_scale)
    finished = args.work / "stranger.safetensors"
    load_low_rank(before, change)
    load_low_rank(student, load_change(finished) if finished.exists() else change)
    factors = nn.ParameterList(low_rank_parameters(student))
    average = Average(student, 0.997)
    critic = place(FaceCritic(), device)
    optimizer = torch.optim.AdamW(factors, betas=(0.0, 0.99), weight_decay=1e-3)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), betas=(0.0, 0.99), weight_decay=1e-3)
    parts = {
        "network": student,
        "average": average.network,
        "critic": critic,
        "optimizer": optimizer,
        "critic_optimizer": critic_optimizer,
    }
    clock = Clock(args.minutes, args.rate, floor=1e-5)
    run_ = Run(args.work / "stranger.ckpt", parts, clock)
    rng = np.random.default_rng(time.time_ns())
    some = rng.choice(len(data), 96, replace=False)
    upright = np.zeros(len(some), np.int64)
    with torch.no_grad():
        sight, _ = look(recognizer, crop(data, some, upright, offsets).to(device))
        measure(critic.heads, sight)
    for group in critic_optimizer.param_groups:
        group["pace"] = args.critic_pace
    programs = Programs(Bundle.load(args.bundle), ONNXRuntimeCPU())
    sampler = Sampler(ordinary, programs, device)
    fast = preset("fast")
    seen = slice(recognizer.margin, recognizer.margin + recognizer.size)
    seen_mask = sampler.pixel_mask[:, :, seen, seen]
    masks = [*[sampler.pixel_mask] * 2, *[seen_mask] * len(FEATURES)]  # of the critic's scores
    plans = [fast.anonymize, preset("balanced").anonymize, fast.hide]
    shares = np.array([0.65, 0.35, 0.0]) * (1 - args.hide) + np.array([0.0, 0.0, args.hide])
    tables = [plan.table(sampler.schedule) for plan in plans]
    moved = torch.compile(student, dynamic=False) if args.compile else student
    still = torch.compile(ordinary.unet, dynamic=False) if args.compile else ordinary.unet
    decode = torch.compile(vae.decode, dynamic=False) if args.compile else vae.decode

    def judge(image: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        features, embedding = look(recognizer, image)
        return critic(image, features), embedding

    judged = torch.compile(judge, dynamic=False) if args.compile else judge

    scored = torch.compile(critic, dynamic=False) if args.compile else critic
    see = torch.compile(look, dynamic=False) if args.compile else look
    probe = held_out(args.work, 29, 14).to(device)

    def faces_of(image: torch.Tensor, latent: torch.Tensor) -> Faces:
        with torch.no_grad(), mixed_precision(device):
            tokens = ordinary.conditioner.embed(image).float()
            _, identities = look(recognizer, image)
        return Faces(image, latent, tokens, identities)

    def save() -> None:
        run_.save()
        save_change(finished, average.network)
        rows = [probe]
        with torch.no_grad():
            faces = faces_of(probe, vae.encode(probe))
            for plan, table in zip(plans, tables, strict=True):
                guidance = sampler.guidance(faces, plan)
                for unet in (before, average.network):
                    same = np.random.default_rng(0)
                    x = sampler.until(unet, faces, plan, table, guidance, len(table.steps), same)
                    rows.append(sampler.pasted(vae.decode, probe, faces.latent, x))
        save_sheet(args.work / f"stranger-{run_.step:06d}.png", rows)

    def outside(image: torch.Tensor) -> torch.Tensor:
        return F.normalize((outsider(127.5 * (image[:, :, 8:120, 8:120] + 1))).float(), dim=1)

    figures: dict[str, list[float]] = {}
    while run_.begin_step(optimizer, critic_optimizer):
        rows = np.sort(rng.choice(len(data), 2 * args.batch, replace=False))
        flips = rng.integers(0, 2, 2 * args.batch)
        images = crop(data, rows, flips, offsets).to(device, memory_format=torch.channels_last)
        both = torch.from_numpy(latents[rows, flips]).float().to(device)
        order = torch.from_numpy(rng.permutation(2 * args.batch)).to(device)
        mine, others = order[: args.batch], order[args.batch :]
        faces = faces_of(images[mine], both[mine])
        which = int(rng.choice(len(plans), p=shares))
        plan, table = plans[which], tables[which]
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
            image = sampler.pasted(decode, faces.image, faces.latent, latent)
        shown = image.detach().requires_grad_()
        with mixed_precision(device):
            scores, embedding = judged(shown)
        deceive = -merit(scores, masks)
        cosine = (embedding * faces.identities).sum(1)
        reached: dict[str, torch.Tensor] = {}
        hidden = plan.guidance.mode == "attract"

        def wrong(cosine: torch.Tensor, hidden: bool = hidden) -> torch.Tensor:
            return F.relu(args.known - cosine if hidden else cosine - args.margin).sum()

        likeness = wrong(cosine)
        if outsider is not None and run_.step % 2:  # it is slow: a few faces at some steps
            few = slice(0, 4)
            with torch.no_grad():
                original = outside(faces.image[few])
            alike_outside = (outside(shown[few]) * original).sum(1)
            likeness = likeness + wrong(alike_outside)
            reached["hidden outsider" if hidden else "outsider"] = alike_outside.mean()
        ramp = min(1.0, run_.step / 150)
        lit = F.avg_pool2d((image - faces.image).detach(), 16)
        toward = F.interpolate(lit, scale_factor=16, mode="bilinear") * 3
        (gradient,) = torch.autograd.grad(deceive, shown, retain_graph=True)
        toward = toward + args.adversarial * ramp * unit(gradient)
        (gradient,) = torch.autograd.grad(likeness, shown)
        alike = gradient.abs().amax((1, 2, 3), keepdim=True) > 1e-9
        toward = toward + args.repel * alike * unit(gradient)
        strength = toward.square().mean((1, 2, 3), keepdim=True).sqrt()
        (gradient,) = torch.autograd.grad((image * toward).sum(), latent)
        error = (predicted - expected).detach()
        reach = (error.square().mean((1, 2, 3), keepdim=True) + 0.01).sqrt()
        pull = args.hold * error / reach + strength * unit(gradient)
        backward((predicted * pull).sum() / predicted.numel() * 10, optimizer, factors)
        average.update(student, run_.step)

        with torch.no_grad(), mixed_precision(device):
            real = sampler.pasted(decode, images[others], both[others], both[others])
            both_faces = torch.cat([real, image.detach()])
            features, _ = see(recognizer, both_faces)
        with mixed_precision(device):
            verdicts = [v.chunk(2) for v in scored(both_faces, features)]
        loss = hinge([r for r, _ in verdicts], [d for _, d in verdicts], masks)
        backward(loss, critic_optimizer, critic)

        run_.step += 1
        reached["moved"] = error.square().mean().sqrt()
        reached["hidden cosine" if hidden else "cosine"] = cosine.mean()
        reached |= {"hinge": loss, "score": -deceive, "light": lit.abs().mean()}
        for name, value in reached.items():
            figures.setdefault(name, []).append(float(value.detach()))
        if run_.step % 25 == 0:
            run_.log(**{k: float(np.mean(v)) for k, v in figures.items()}, minutes=clock.spent / 60)
            figures.clear()
        if run_.step % 200 == 0:
            save()
    save()


if __name__ == "__main__":
    main()
