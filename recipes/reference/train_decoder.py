"""Sharpen the decoder against a frozen encoder: pixel, recognizer-feature and adversarial loss.

    python recipes/reference/train_decoder.py --work .work/reference --minutes 20

Needs `autoencoder.pt`, `recognizer.pt`, `diffusion.pt` and the `latents.npy` that
train_diffusion.py leaves. A decoder trained on pixel error alone averages eyes, teeth and hair into
smears wherever the latent leaves a choice. Part of the latents is what the diffusion model makes of
them when it is given a little noise to remove, and the face to aim at is the photo all the same: so
the decoder learns to turn that model's own errors into plausible faces. Writes `decoder.pt`: the
whole autoencoder, its encoder untouched.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    Average,
    Clock,
    Run,
    adamw,
    backward,
    held_out,
    load_autoencoder,
    load_faces,
    load_recognizer,
    mixed_precision,
    place,
    psnr,
    save_checkpoint,
    save_sheet,
    training_arguments,
)
from train_diffusion import Diffusion, crop, encode_all, load_diffusion, signal_levels

from diffveil_export.reference.recognizer import FaceRecognizer


class Critic(nn.Module):
    """Patch discriminator with hinge loss: images [B, 3, 128, 128] → score maps, features."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.fine = nn.ModuleList(
            [
                norm(nn.Conv2d(12, 64, 3, padding=1)),
                norm(nn.Conv2d(64, 96, 4, 2, 1)),
                norm(nn.Conv2d(96, 96, 3, padding=1)),
            ]
        )
        self.fine_score = nn.Conv2d(96, 1, 3, padding=1)
        self.coarse = nn.ModuleList(
            [norm(nn.Conv2d(96, 128, 4, 2, 1)), norm(nn.Conv2d(128, 192, 4, 2, 1))]
        )
        self.coarse_score = nn.Conv2d(192, 1, 3, padding=1)

    def forward(self, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        x, features = F.pixel_unshuffle(image, 2), []
        for layer in self.fine:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        scores = [self.fine_score(x)]
        for layer in self.coarse:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return [*scores, self.coarse_score(x)], features


def recognizer_features(network: FaceRecognizer, image: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of the recognizer's stages, unit-normalised over channels."""
    x = image[
        :,
        :,
        network.margin : network.margin + network.size,
        network.margin : network.margin + network.size,
    ]
    features = []
    for i, layer in enumerate(network.features):
        x = layer(x)
        if i in (1, 3, 7):
            features.append(F.normalize(x.float(), dim=1))
    return features


@torch.no_grad()
def retell(network: Diffusion, latent: torch.Tensor, top: int, steps: int = 3) -> torch.Tensor:
    """Latents [B, C, s, s] noised to a timestep of up to `top` and denoised again, unconditioned.

    Each has its own timestep: small ones leave the face as it is, larger ones the diffusion
    model's typical errors.
    """
    levels = signal_levels().to(latent.device)
    first = torch.rand(len(latent), device=latent.device) * (top - 50) + 50
    empty = network.conditioner.unconditional().expand(len(latent), -1, -1)
    x = clean = epsilon = latent
    for index in range(steps):
        t = (first * (1 - index / steps)).long()
        level = levels[t].view(-1, 1, 1, 1)
        if index == 0:
            x = level.sqrt() * x + (1 - level).sqrt() * torch.randn_like(x)
        else:
            x = level.sqrt() * clean + (1 - level).sqrt() * epsilon
        epsilon = network.unet(x, t, empty, return_dict=False)[0]
        clean = (x - (1 - level).sqrt() * epsilon) / level.sqrt()
    return clean


def main() -> None:
    parser = training_arguments(__doc__, minutes=20, batch=16, rate=2e-4)
    parser.add_argument("--adversarial", type=float, default=0.02)
    parser.add_argument("--perceptual", type=float, default=0.15)
    parser.add_argument("--top", type=int, default=450, help="highest timestep of retold latents")
    args = parser.parse_args()
    device = args.device

    faces = load_faces(args.work)
    vae = place(load_autoencoder(args.work / "autoencoder.pt"), device)
    vae.encoder.requires_grad_(False)
    latents, offsets = encode_all(faces, args.work, vae, device)
    recognizer = place(load_recognizer(args.work).fuse().requires_grad_(False), device)
    diffusion = load_diffusion(args.work).to(device).eval().requires_grad_(False)
    critic = place(Critic(), device)
    vae_before = copy.deepcopy(vae).eval().requires_grad_(False)
    average = Average(vae, 0.998)
    decoder_optimizer = adamw(vae.decoder, 1e-3, beta=0.5)
    critic_optimizer = adamw(critic, 1e-3, beta=0.5)
    parts = {
        "network": vae,
        "average": average.network,
        "critic": critic,
        "optimizer": decoder_optimizer,
        "critic_optimizer": critic_optimizer,
    }
    clock = Clock(args.minutes, args.rate, floor=1e-6)
    run = Run(args.work / "decoder.ckpt", parts, clock)
    rng = np.random.default_rng(time.time_ns())
    probe = held_out(args.work, 10, 32).to(device)

    def save() -> None:
        with torch.no_grad():
            latent = average.network.encode(probe)
            output = average.network.decode(latent)
            retold = retell(diffusion, latent[:10], args.top)
            rows = [probe[:10], output[:10], vae_before.decode(retold)]
            rows.append(average.network.decode(retold))
        print(f"held-out PSNR {psnr(output, probe):.2f} dB", flush=True)
        save_sheet(args.work / "decoder.png", rows)
        run.save()
        save_checkpoint(args.work / "decoder.pt", average.network.state_dict())

    while run.begin_step(decoder_optimizer, critic_optimizer):
        rows = rng.choice(len(faces), args.batch, replace=False)
        flips = rng.integers(0, 2, args.batch)
        image = crop(faces, rows, flips, offsets).to(device, memory_format=torch.channels_last)
        latent = torch.from_numpy(latents[rows, flips]).float().to(device)
        half = args.batch // 2
        with mixed_precision(device):
            latent = torch.cat([latent[:half], retell(diffusion, latent[half:], args.top).float()])

        with mixed_precision(device):
            output = vae.decode(latent.to(memory_format=torch.channels_last)).float()
            scores, fake = critic(output)
            with torch.no_grad():
                _, real = critic(image)
                target = recognizer_features(recognizer, image)
            seen = recognizer_features(recognizer, output)
        error = output - image
        gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        pixel = error.abs().mean() + 0.5 * gradient
        pairs = zip(seen, target, strict=True)
        perceptual = torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).sum()
        pairs = zip(fake, real, strict=True)
        matching = torch.stack([(a.float() - b.float()).abs().mean() for a, b in pairs]).sum()
        adversarial = -torch.stack([s.float().mean() for s in scores]).sum()
        # The critic has no opinion worth following before it has seen some faces.
        weight = args.adversarial * min(1.0, run.step / 300)
        loss = pixel + args.perceptual * perceptual + weight * (adversarial + 2 * matching)
        backward(loss, decoder_optimizer, vae.decoder)
        average.update(vae, run.step)

        with mixed_precision(device):
            real_scores, _ = critic(image)
            fake_scores, _ = critic(output.detach())
        hinge = torch.stack([F.relu(1 - s.float()).mean() for s in real_scores]).sum()
        hinge = hinge + torch.stack([F.relu(1 + s.float()).mean() for s in fake_scores]).sum()
        backward(hinge, critic_optimizer, critic)
        run.step += 1
        if run.step % 50 == 0:
            run.log(pixel=pixel.item(), perceptual=perceptual.item(), hinge=hinge.item())
        if run.step % 300 == 0:
            save()
    save()


if __name__ == "__main__":
    main()
