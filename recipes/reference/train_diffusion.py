"""Train UNet and conditioner together, as diffusion autoencoders do: each face is its own prompt.

    python recipes/reference/train_diffusion.py --work .work/reference --minutes 70

Needs `autoencoder.pt`. Resumes from its last checkpoint; `diffusion.pt` holds the averaged
networks, `samples-*.png` show held-out faces: photo, autoencoder round trip, resampled.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    CENTER,
    CROP,
    Average,
    Clock,
    Run,
    adamw,
    backward,
    held_out,
    load_autoencoder,
    load_faces,
    load_weights,
    mixed_precision,
    place,
    save_checkpoint,
    save_sheet,
    to_unit,
    training_arguments,
)

from diffveil_export.reference.autoencoder import FaceAutoencoder
from diffveil_export.reference.conditioner import Conditioner

UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (128, 192, 192),
    "layers_per_block": 2,
    "cross_attention_dim": 256,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    # Attention at 8² and 4² only: at 16² it would cost more than all convolutions together.
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    # The conditioning also joins the timestep embedding, pooled, as in diffusion autoencoders: by
    # cross-attention alone so small a network does not learn to listen to it in reasonable time.
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
}
JITTER = 2  # pixels of misalignment that detectors leave

# Below this timestep anonymization samples without conditioning, so half of the training does too.
UNCONDITIONAL_BELOW = 450


def signal_levels() -> torch.Tensor:
    """ᾱ [1000] of the scaled-linear schedule of Stable Diffusion 1.x."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    return torch.cumprod(1 - beta, 0).float()


class Diffusion(nn.Module):
    """The two networks that are trained together."""

    def __init__(self) -> None:
        super().__init__()
        unet_class: Any = UNet2DConditionModel  # has no types
        self.unet: Any = unet_class(**UNET)
        self.conditioner = Conditioner()

    def forward(
        self, noisy: torch.Tensor, t: torch.Tensor, image: torch.Tensor, drop: torch.Tensor
    ) -> torch.Tensor:
        """ε of noisy latents [B, 8, 16, 16] at t [B]; faces with `drop` [B] go unconditioned."""
        return self.predict(noisy, t, self.stage_tokens(t, image), drop)

    def stage_tokens(self, t: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Each image's token [B, 256] of the stage that its timestep t [B] belongs to."""
        tokens = self.conditioner.embed(image)
        return tokens[torch.arange(len(t)), t * 10 // 1000]

    def predict(
        self, noisy: torch.Tensor, t: torch.Tensor, token: torch.Tensor, drop: torch.Tensor
    ) -> torch.Tensor:
        """ε of noisy latents [B, 8, 16, 16] at t [B], given tokens [B, 256]."""
        token = torch.where(drop[:, None], self.conditioner.empty.to(token.dtype), token)
        epsilon: torch.Tensor = self.unet(
            noisy, t, self.conditioner.expand(token), return_dict=False
        )[0]
        return epsilon


def load_diffusion(work: Path) -> Diffusion:
    """The trained networks, on the CPU."""
    networks = Diffusion()
    networks.load_state_dict(load_weights(work / "diffusion.pt"))
    return networks


def crop(
    faces: np.ndarray, rows: np.ndarray, flips: np.ndarray, offsets: np.ndarray
) -> torch.Tensor:
    """Crops [B, 3, 128, 128] in [-1, 1] at each face's own fixed offset, mirrored where asked."""
    out = np.empty((len(rows), CROP, CROP, 3), np.uint8)
    for i, (row, flip) in enumerate(zip(rows, flips, strict=True)):
        y, x = CENTER + offsets[row, flip]
        face = faces[row, y : y + CROP, x : x + CROP]
        out[i] = face[:, ::-1] if flip else face
    return to_unit(out)


def encode_all(
    faces: np.ndarray, work: Path, network: FaceAutoencoder, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Latents float16 [N, 2, 8, 16, 16] (plain, mirrored), crop offsets int [N, 2, 2]; cached."""
    offsets = np.random.default_rng(0).integers(-JITTER, JITTER + 1, (len(faces), 2, 2))
    path = work / "latents.npy"
    if not path.exists():
        latents = np.empty((len(faces), 2, 8, 16, 16), np.float16)
        with torch.no_grad(), mixed_precision(device):
            for flip in (0, 1):
                for start in range(0, len(faces), 64):
                    rows = np.arange(start, min(start + 64, len(faces)))
                    image = crop(faces, rows, np.full(len(rows), flip), offsets)
                    image = image.to(device, memory_format=torch.channels_last)
                    latents[rows, flip] = network.encode(image).float().cpu().numpy()
        np.save(path, latents)
    return np.load(path), offsets


def face_weight() -> torch.Tensor:
    """Loss weight [1, 1, 16, 16]: the face counts fully, the surroundings less."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    inside = torch.sigmoid(8 * (1.0 - (x / 0.85).square() - ((y - 0.08) / 0.95).square()))
    return (0.3 + 0.7 * inside)[None, None]


@torch.no_grad()
def resample(
    network: Diffusion,
    vae: FaceAutoencoder,
    image: torch.Tensor,
    strength: float,
    steps: int,
    seed: int = 0,
) -> torch.Tensor:
    """DDIM from the noised latent of each photo: what anonymization does, without guidance."""
    levels = signal_levels()
    count = max(1, round(steps * strength))
    times = [1 + 1000 // steps * i for i in range(steps)][:count]
    latent = vae.encode(image)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    start = levels[times[-1]]
    x = start.sqrt() * latent + (1 - start).sqrt() * noise
    for t, previous in zip(times[::-1], [*times[:-1][::-1], 0], strict=True):
        batch = torch.full((len(x),), t, device=x.device)
        drop = torch.full((len(x),), t <= 400, device=x.device)
        epsilon = network(x, batch, image, drop)
        a, b = levels[t], levels[previous]
        clean = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        x = b.sqrt() * clean + (1 - b).sqrt() * epsilon
    return vae.decode(x)


def main() -> None:
    parser = training_arguments(__doc__, minutes=70, batch=32, rate=6e-4)
    parser.add_argument("--guess", type=float, default=0.05, help="weight of the tokens' own loss")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    args = parser.parse_args()
    device = args.device

    faces = load_faces(args.work)
    vae = place(load_autoencoder(args.work / "autoencoder.pt"), device)
    vae.eval().requires_grad_(False)
    latents, offsets = encode_all(faces, args.work, vae, device)
    rng = np.random.default_rng(time.time_ns())
    levels, weight = signal_levels().to(device), face_weight().to(device)

    network = place(Diffusion(), device)
    average = Average(network, 0.9992)
    # For training only: a token from which the latent can be guessed is worth attending to.
    width: Any = network.conditioner.config["width"]
    guesser = nn.Linear(width, latents[0, 0].size).to(device)
    trained = nn.ModuleList([network, guesser])
    optimizer = adamw(trained, 1e-2)
    parts = {
        "network": network,
        "guesser": guesser,
        "average": average.network,
        "optimizer": optimizer,
    }
    clock = Clock(args.minutes, args.rate, floor=1e-5)
    run = Run(args.work / "diffusion.ckpt", parts, clock)
    predict = torch.compile(network.predict) if args.compile else network.predict
    probe = held_out(args.work, 35, 12).to(device)

    def save() -> None:
        run.save()
        with torch.no_grad():
            rows = [probe, vae.decode(vae.encode(probe))]
        for strength, steps in ((0.6, 10), (0.8, 10), (1.0, 20)):
            rows.append(resample(average.network, vae, probe, strength, steps))
        save_sheet(args.work / f"samples-{run.step:06d}.png", rows)

    total, total_guess, seen = 0.0, 0.0, 0
    order: list[int] = []
    while run.begin_step(optimizer):
        if len(order) < args.batch:
            order = rng.permutation(len(faces)).tolist()
        rows = np.sort([order.pop() for _ in range(args.batch)])
        flips = rng.integers(0, 2, args.batch)
        image = crop(faces, rows, flips, offsets).to(device, memory_format=torch.channels_last)
        latent = torch.from_numpy(latents[rows, flips]).float()
        latent = latent.to(device, memory_format=torch.channels_last)
        # One timestep from each of B equal bins lowers the variance of the loss; nine in ten
        # below 800, where anonymize and hide sample.
        bins = (np.arange(args.batch) + rng.random(args.batch)) / args.batch
        times = np.where(bins < 0.9, bins / 0.9 * 800, 800 + (bins - 0.9) * 2000)
        t = torch.from_numpy(rng.permutation(times.astype(np.int64))).to(device)
        chance = torch.where(t < UNCONDITIONAL_BELOW, 0.5, 0.1)
        drop = torch.rand(args.batch, device=device) < chance
        a = levels[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(latent)
        noisy = a.sqrt() * latent + (1 - a).sqrt() * noise
        with mixed_precision(device):
            token = network.stage_tokens(t, image)
            epsilon = predict(noisy, t, token, drop)
            guess = guesser(token).view_as(latent)
        # Min-SNR weighting (Hang et al. 2023, γ = 5): fine noise must not drown out structure.
        snr = a / (1 - a)
        error = (epsilon.float() - noise).square() * weight
        guessed = ((guess.float() - latent).square() * weight).mean()
        loss = (error * (5 / snr).clamp(max=1)).mean() + args.guess * guessed
        backward(loss, optimizer, trained)
        average.update(network, run.step)
        run.step += 1
        total, total_guess, seen = total + loss.item(), total_guess + guessed.item(), seen + 1
        if run.step % 100 == 0:
            run.log(loss=total / seen, guess=total_guess / seen, minutes=clock.spent / 60)
            total, total_guess, seen = 0.0, 0.0, 0
        if run.step % 500 == 0:
            save()
    save()
    save_checkpoint(args.work / "diffusion.pt", average.network.state_dict())


if __name__ == "__main__":
    main()
