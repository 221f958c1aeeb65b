"""Teach the few-step change to draw strangers: along its own guided samples, against a critic.

    python recipes/reference/train_stranger.py --work .work/reference --minutes 60 --compile

Needs `autoencoder.pt`, `diffusion.pt`, `recognizer.pt`, the `latents.npy` that train_diffusion.py
leaves, and a bundle whose `guide_latent` steers the samples as anonymize will. Goes on from
`few.safetensors` (distill.py). A batch is sampled as anonymize samples it, up to a step chosen at
random; there the predicted clean face is judged, pasted into its photo:

* a critic on pixels and on the frozen recognizer's features tells such faces from real ones, so
  that features are sharp and fit the head around them;
* the recognizer must not take the face for the photo's person;
* the ordinary model's prediction, and the photo's light, hold it where it should be.

Backpropagation goes through the last evaluation only (Clark et al., arXiv 2309.17400, DRaFT-1).
Writes `stranger.ckpt`, a checkpoint; `stranger.safetensors`, the averaged low-rank weights;
`stranger-*.png`, held-out faces: photo, before, now, each by both presets' steps.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
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
from distill import unit
from train_decoder import Critic as PixelCritic
from train_diffusion import Diffusion, crop, encode_all, load_diffusion

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.fused import Background
from diffveil.guidance import IdentityGuidance
from diffveil.masks import face_mask, latent_mask
from diffveil.plans import Plan
from diffveil.presets import preset
from diffveil.samplers import SamplerTable, Step
from diffveil.sampling import add_noise, run
from diffveil_export.models.low_rank import (
    load_low_rank,
    low_rank_parameters,
)
from diffveil_export.reference.recognizer import FaceRecognizer

FEATURES = {3: 96, 7: 192, 10: 256}  # layers of the recognizer that the critic reads: channels


class Critic(nn.Module):
    """Scores faces [B, 3, 128, 128] by their pixels and by a frozen recognizer's features."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = PixelCritic()
        norm = nn.utils.parametrizations.spectral_norm
        self.heads = nn.ModuleList(
            nn.Sequential(
                norm(nn.Conv2d(width, 64, 3, padding=1)),
                nn.LeakyReLU(0.2),
                norm(nn.Conv2d(64, 64, 3, padding=1)),
                nn.LeakyReLU(0.2),
                nn.Conv2d(64, 1, 3, padding=1),
            )
            for width in FEATURES.values()
        )

    def forward(self, image: torch.Tensor, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Score maps, each [B, 1, h, w]."""
        scores, _ = self.pixels(image)
        return [*scores, *(head(f) for head, f in zip(self.heads, features, strict=True))]


def look(
    recognizer: FaceRecognizer, image: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features for the critic, of about unit variance, and embeddings [B, E] of [B, 3, S, S]."""
    start, stop = recognizer.margin, recognizer.margin + recognizer.size
    x, features = image[:, :, start:stop, start:stop], []
    for i, layer in enumerate(recognizer.features):
        x = layer(x)
        if i in FEATURES:
            features.append(unit(x.float()))
    pooled = (x.flatten(2) * recognizer.pool).sum(2)
    return features, F.normalize(recognizer.head(pooled).float(), dim=-1)


@dataclass(frozen=True)
class Faces:
    """A batch on its way: everything that stays the same over the steps."""

    image: torch.Tensor  # [B, 3, S, S] in [-1, 1]
    latent: torch.Tensor  # [B, C, s, s]
    tokens: torch.Tensor  # [B, 10, D]
    identities: torch.Tensor  # [B, E]


class Sampler:
    """anonymize of a preset, with networks that are still in training.

    Args:
        network: The frozen model, for its conditioner.
        programs: Programs of the bundle whose `guide_latent` steers.
        device: Where the networks are.
    """

    def __init__(self, network: Diffusion, programs: Programs, device: str) -> None:
        self._network, self._programs, self._device = network, programs, device
        self.schedule = programs.bundle.manifest.schedule
        size, template = programs.bundle.image_size, programs.bundle.template
        mask = face_mask(size, template)
        self.pixel_mask = torch.from_numpy(mask)[None, None].to(device)
        small = programs.bundle.dimensions.latent_size
        self.latent_mask = latent_mask(mask, small)[None, None]

    def conditions(self, faces: Faces, plan: Plan, timestep: int) -> torch.Tensor:
        """Conditioning [B, T, D] at a timestep."""
        conditioner = self._network.conditioner
        if timestep <= plan.conditional_above:
            return conditioner.unconditional().expand(len(faces.latent), -1, -1)
        return conditioner.expand(faces.tokens[:, timestep // 100])

    def guidance(self, faces: Faces, plan: Plan) -> IdentityGuidance:
        """The preset's guidance away from these faces."""
        return IdentityGuidance(self._programs, plan.guidance, faces.identities.cpu().numpy())

    @torch.no_grad()
    def until(
        self,
        unet: Any,
        faces: Faces,
        plan: Plan,
        table: SamplerTable,
        guidance: IdentityGuidance,
        stop: int,
        rng: np.random.Generator,
    ) -> torch.Tensor:
        """Latents [B, C, s, s] before step `stop` of the table, sampled by `unet`."""
        clean = faces.latent.cpu().numpy()
        noise = rng.standard_normal(clean.shape, np.float32)
        x = add_noise(self.schedule, clean, noise, table.start_timestep)
        if stop:

            def denoise(x: np.ndarray, timestep: int, /) -> np.ndarray:
                given = torch.from_numpy(x).to(self._device)
                t = torch.full((len(x),), timestep, device=self._device)
                conditioning = self.conditions(faces, plan, timestep)
                with mixed_precision(self._device):
                    epsilon = unet(given, t, conditioning, return_dict=False)[0]
                return epsilon.float().cpu().numpy()  # type: ignore[no-any-return]

            mask = np.repeat(self.latent_mask, len(clean), axis=0)
            blend = Background(self.schedule, plan, clean, noise, mask)
            x, _ = run(
                SamplerTable(table.name, table.start_timestep, table.steps[:stop]),
                x,
                denoise,
                gradient=guidance,
                noise=lambda _: rng.standard_normal(clean.shape, np.float32),
                blend=blend,
            )
        return torch.from_numpy(x).to(self._device)

    def clean(
        self, unet: Any, faces: Faces, plan: Plan, step: Step, x: torch.Tensor
    ) -> torch.Tensor:
        """The clean latent that `unet` predicts in x at a step; unguided."""
        t = torch.full((len(x),), step.timestep, device=x.device)
        epsilon = unet(x, t, self.conditions(faces, plan, step.timestep), return_dict=False)[0]
        clean: torch.Tensor = step.x0_x * x + step.x0_eps * epsilon.float()
        return clean

    def nudge(self, guidance: IdentityGuidance, step: Step, x0: torch.Tensor) -> torch.Tensor:
        """What guidance adds to a predicted clean latent."""
        if step.g == 0.0:
            return torch.zeros_like(x0)
        reach = step.g / self.schedule.signal(step.next_timestep)
        direction = guidance(x0.detach().cpu().numpy(), step)
        return torch.from_numpy(-reach * direction).float().to(x0.device)

    def pasted(
        self, decode: Any, image: torch.Tensor, clean: torch.Tensor, latent: torch.Tensor
    ) -> torch.Tensor:
        """Decoded faces [B, 3, S, S] within their photos; around them the photos' clean latents."""
        mask = torch.from_numpy(self.latent_mask).to(latent.device)
        whole = clean + mask * (latent - clean)
        face = decode(whole.to(memory_format=torch.channels_last)).float()
        pasted: torch.Tensor = image + self.pixel_mask * (face.clamp(-1.1, 1.1) - image)
        return pasted


def main() -> None:
    parser = training_arguments(__doc__, minutes=60, batch=12, rate=1.5e-3)
    parser.add_argument("--bundle", default="runtime/diffveil/bundles/reference-128")
    parser.add_argument("--few-scale", type=float, default=0.4, help="share of distill.py's change")
    parser.add_argument("--hold", type=float, default=0.2, help="weight of the ordinary prediction")
    parser.add_argument("--adversarial", type=float, default=1.0)
    parser.add_argument("--repel", type=float, default=0.3)
    parser.add_argument("--margin", type=float, default=0.0, help="cosine that is strange enough")
    parser.add_argument("--teacher", type=Path, help="TorchScript recognizer that also must not")
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
    critic = place(Critic(), device)
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
    programs = Programs(Bundle.load(args.bundle), ONNXRuntimeCPU())
    sampler = Sampler(ordinary, programs, device)
    plans = [preset(name).anonymize for name in ("fast", "balanced")]
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
        which = int(rng.random() < 0.35)
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
        deceive = -torch.stack([score.float().mean() for score in scores]).sum()
        cosine = (embedding * faces.identities).sum(1)
        likeness = F.relu(cosine - args.margin).sum()
        if outsider is not None and run_.step % 2:  # it is slow: a few faces at some steps
            few = slice(0, 4)
            with torch.no_grad():
                original = outside(faces.image[few])
            seen = (outside(shown[few]) * original).sum(1)
            likeness = likeness + F.relu(seen - args.margin).sum()
            figures.setdefault("outsider", []).append(float(seen.detach().mean()))
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
            verdicts = [v.float().chunk(2) for v in scored(both_faces, features)]
        hinge = torch.stack(
            [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in verdicts]
        ).sum()
        backward(hinge, critic_optimizer, critic)

        run_.step += 1
        reached: dict[str, Any] = {"moved": error.square().mean().sqrt(), "cosine": cosine.mean()}
        reached |= {"hinge": hinge, "score": -deceive, "light": lit.abs().mean()}
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
