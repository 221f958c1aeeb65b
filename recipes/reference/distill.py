"""Distil the diffusion model to a handful of steps: consistency and an adversary, low-rank weights.

    python recipes/reference/distill.py --work .work/reference --minutes 60

Needs `autoencoder.pt`, `diffusion.pt` and the `latents.npy` that train_diffusion.py leaves. The
student is the teacher with a low-rank change to every weight; it learns to arrive at the clean
latent from any noise level in one evaluation:

* consistency (Song et al., arXiv 2303.01469; Luo et al., arXiv 2310.04378): its answer at x_t must
  be its answer where the teacher's probability flow leads from x_t;
* an adversary (Sauer et al., arXiv 2403.12015): heads on the frozen teacher's features of noised
  latents tell real from predicted ones, so predictions are sharp where regression would average.

A part of the x_t are noised predictions of the student itself, as sampling will meet them. Writes
`few.ckpt`, a checkpoint; `few.safetensors`, the averaged low-rank weights; `few-*.png`, held-out
faces: photo, round trip, the teacher's four steps, the student's four and two.
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
    load_weights,
    mixed_precision,
    place,
    save_change,
    save_sheet,
    training_arguments,
)
from train_diffusion import (
    UNET,
    Diffusion,
    crop,
    encode_all,
    face_weight,
    load_diffusion,
    signal_levels,
)

from diffveil_export.models.low_rank import (
    add_low_rank,
    load_low_rank,
    low_rank_parameters,
)

STRIDE = 40  # timesteps that the teacher leads down
NODES = (199, 399, 599, 799)  # where four steps from strength 0.8 evaluate the student
HIGHEST = 860


class Critic(nn.Module):
    """Scores latents by a frozen UNet's features; only the heads are trained."""

    def __init__(self) -> None:
        super().__init__()
        widths = UNET["block_out_channels"]
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 64, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(64, 1, 1),
            )
            for width in (*widths, widths[-1])
        )

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Score maps of feature maps [B, c, h, w], which are brought to unit size first."""
        return [head(unit(f.float())) for head, f in zip(self.heads, features, strict=True)]


def features_of(
    unet: Any, x: torch.Tensor, t: torch.Tensor, conditioning: torch.Tensor
) -> list[torch.Tensor]:
    """Feature maps of the down and middle blocks of a diffusers UNet at x [B, C, s, s], t [B]."""
    time_embedding = unet.time_embedding(unet.time_proj(t).to(x.dtype))
    time_embedding = time_embedding + unet.add_embedding(conditioning)
    h, features = unet.conv_in(x), []
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            h, states = block(h, temb=time_embedding, encoder_hidden_states=conditioning)
        else:
            h, states = block(h, temb=time_embedding)
        features.append(states[1])
    middle = unet.mid_block(h, time_embedding, encoder_hidden_states=conditioning)
    return [*features, middle]


def unit(maps: torch.Tensor) -> torch.Tensor:
    """Each face's maps [B, C, s, s] scaled to unit root mean square."""
    return maps / maps.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-8)


class Levels:
    """Noise levels of the schedule, shaped for latents."""

    def __init__(self, device: str) -> None:
        self._levels = signal_levels().to(device)

    def __call__(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal α and noise σ, [B, 1, 1, 1], at timesteps [B]."""
        level = self._levels[t].view(-1, 1, 1, 1)
        return level.sqrt(), (1 - level).sqrt()


@torch.no_grad()
def sample(
    unet: nn.Module, latent: torch.Tensor, conditions: Any, steps: int, fresh: bool, levels: Levels
) -> torch.Tensor:
    """From 0.8 of noise to clean: each prediction noised again, freshly or with its own noise."""
    generator = torch.Generator().manual_seed(0)
    x0, epsilon = latent, torch.randn(latent.shape, generator=generator).to(latent)
    for k in range(steps, 0, -1):
        t = torch.full((len(latent),), 800 * k // steps - 1, device=latent.device)
        if fresh and k < steps:
            epsilon = torch.randn(latent.shape, generator=generator).to(latent)
        a, s = levels(t)
        x = a * x0 + s * epsilon
        epsilon = unet(x, t, conditions(t), return_dict=False)[0]
        x0 = (x - s * epsilon) / a
    return x0


def main() -> None:
    parser = training_arguments(__doc__, minutes=60, batch=16, rate=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adversarial", type=float, default=1.0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    args = parser.parse_args()
    device = args.device

    faces = load_faces(args.work)
    vae = load_autoencoder(args.work / "autoencoder.pt").to(device).eval().requires_grad_(False)
    latents, offsets = encode_all(faces, args.work, vae, device)
    vae.load_state_dict(load_weights(autoencoder_file(args.work)))
    levels, weight = Levels(device), face_weight().to(device)
    rng = np.random.default_rng(time.time_ns())

    def load() -> Diffusion:
        return place(load_diffusion(args.work).eval().requires_grad_(False), device)

    teacher, student = load(), load().unet
    finished = args.work / "few.safetensors"
    if finished.exists():  # gone on from, as other scripts do from `.pt` files
        load_low_rank(student, load_change(finished))
    else:
        add_low_rank(student, args.rank)
    factors = nn.ParameterList(low_rank_parameters(student))
    average = Average(student, 0.998)
    critic = place(Critic(), device)
    optimizer = torch.optim.AdamW(factors, betas=(0.5, 0.99), weight_decay=1e-3)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), betas=(0.0, 0.99), weight_decay=1e-3)
    parts = {
        "network": student,
        "average": average.network,
        "critic": critic,
        "optimizer": optimizer,
        "critic_optimizer": critic_optimizer,
    }
    clock = Clock(args.minutes, args.rate, floor=1e-5)
    run = Run(args.work / "few.ckpt", parts, clock)
    predict = torch.compile(student) if args.compile else student
    follow = torch.compile(teacher.unet) if args.compile else teacher.unet
    look = torch.compile(features_of) if args.compile else features_of
    empty = teacher.conditioner.unconditional()
    probe = held_out(args.work, 35, 12).to(device)

    def save() -> None:
        run.save()
        save_change(finished, average.network)
        with torch.no_grad():
            tokens, latent = teacher.conditioner.embed(probe), vae.encode(probe)

            def conditions(t: torch.Tensor) -> torch.Tensor:
                if int(t[0]) <= 400:
                    return empty.expand(len(t), -1, -1)
                return teacher.conditioner.expand(tokens[:, int(t[0]) // 100])

            rows = [latent, sample(teacher.unet, latent, conditions, 4, False, levels)]
            rows += [sample(average.network, latent, conditions, n, True, levels) for n in (4, 2)]
            sheet = [probe, *(vae.decode(row) for row in rows)]
        save_sheet(args.work / f"few-{run.step:06d}.png", sheet)

    def answer(network: Any, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """The clean latent that a network predicts in x [B, C, s, s] at t [B]."""
        a, s = levels(t)
        epsilon: torch.Tensor = network(x, t, c, return_dict=False)[0]
        return (x - s * epsilon.float()) / a

    figures: dict[str, float] = {}
    while run.begin_step(optimizer, critic_optimizer):
        rows = np.sort(rng.choice(len(faces), args.batch, replace=False))
        flips = rng.integers(0, 2, args.batch)
        image = crop(faces, rows, flips, offsets).to(device, memory_format=torch.channels_last)
        latent = torch.from_numpy(latents[rows, flips]).float().to(device)
        nodes = rng.choice(NODES, args.batch) - rng.integers(0, 30, args.batch)
        times = np.where(rng.random(args.batch) < 0.6, nodes, rng.integers(20, HIGHEST, args.batch))
        t = torch.from_numpy(times).to(device)
        # Where anonymize (above 400) and hide (above 600) condition, and sometimes elsewhere.
        chance = torch.where(t > 600, 0.08, torch.where(t > 400, 0.3, 0.8)).to(device)
        drop = torch.rand(args.batch, device=device) < chance

        with mixed_precision(device), torch.no_grad():
            tokens = teacher.conditioner.embed(image)
            every = torch.arange(args.batch, device=device)

            def conditioned(at: torch.Tensor, tokens=tokens, drop=drop, every=every) -> Any:  # type: ignore[no-untyped-def]
                token = torch.where(
                    drop[:, None],
                    teacher.conditioner.empty.to(tokens.dtype),
                    tokens[every, at * 10 // 1000],
                )
                return teacher.conditioner.expand(token)

            base = latent
            if run.step > 200:  # a third: what the student makes of a noisier latent
                third = args.batch // 3
                above = (t[:third] + torch.randint(100, 400, (third,), device=device)).clamp(
                    max=HIGHEST
                )
                a, s = levels(above)
                noisy = a * latent[:third] + s * torch.randn_like(latent[:third])
                high = teacher.conditioner.expand(tokens[:third][every[:third], above * 10 // 1000])
                base = torch.cat([answer(student, noisy, above, high), latent[third:]])
            a, s = levels(t)
            x = a * base + s * torch.randn_like(base)
            condition = conditioned(t)
            lower = (t - STRIDE).clamp(min=0)
            a_low, s_low = levels(lower)
            epsilon = follow(x, t, condition, return_dict=False)[0].float()
            x_low = a_low * (x - s * epsilon) / a + s_low * epsilon
            target = answer(predict, x_low, lower, conditioned(lower))
            target = torch.where(lower.view(-1, 1, 1, 1) < STRIDE // 2, x_low / a_low, target)

        with mixed_precision(device):
            predicted = answer(predict, x, t, condition)

        # Fresh noise of the adversary's own: neither side can rely on the finest detail alone.
        at = (400 * torch.rand(args.batch, device=device) ** 1.5).long()
        a, s = levels(at)
        blank = empty.expand(args.batch, -1, -1)
        fake = predicted.detach().requires_grad_(True)
        with mixed_precision(device):
            seen = look(teacher.unet, a * fake + s * torch.randn_like(fake), at, blank)
            scores = critic(seen)
        deceive = -torch.stack([score.float().mean() for score in scores]).sum()
        (follow_critic,) = torch.autograd.grad(deceive, fake)
        error = predicted.detach() - target
        # Pseudo-Huber: its gradient is the error, bounded for faces that are far off.
        reach = (error.square().mean((1, 2, 3), keepdim=True) + 0.01).sqrt()
        consistency = error / reach * weight
        ramp = args.adversarial * min(1.0, run.step / 300)
        pull = consistency + 0.3 * ramp * unit(follow_critic)
        backward((predicted * pull).sum() / predicted.numel() * 10, optimizer, factors)
        average.update(student, run.step)

        with torch.no_grad(), mixed_precision(device):
            other = latent[torch.randperm(args.batch, device=device)]
            known = look(teacher.unet, a * other + s * torch.randn_like(other), at, blank)
        with mixed_precision(device):
            real, false = critic(known), critic([f.detach() for f in seen])
        hinge: Any = sum(
            F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean()
            for r, f in zip(real, false, strict=True)
        )
        backward(hinge, critic_optimizer, critic)

        run.step += 1
        reached = {"consistency": error.square().mean().sqrt(), "hinge": hinge, "score": -deceive}
        for name, value in reached.items():
            figures[name] = figures.get(name, 0.0) + float(value.detach())
        if run.step % 50 == 0:
            run.log(**{k: v / 50 for k, v in figures.items()}, minutes=clock.spent / 60)
            figures.clear()
        if run.step % 500 == 0:
            save()
    save()


if __name__ == "__main__":
    main()
