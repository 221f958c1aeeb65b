"""Train the autoencoder: L1 + gradient L1 + a light KL term.

    python recipes/reference/train_autoencoder.py --work .work/reference --minutes 34

Resumes from its last checkpoint; `autoencoder.pt` holds the averaged network.
"""

from __future__ import annotations

import sys
import time
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
    batches,
    held_out,
    load_faces,
    mixed_precision,
    place,
    psnr,
    save_checkpoint,
    training_arguments,
)

from diffveil_export.reference.autoencoder import FaceAutoencoder


def loss_of(
    network: FaceAutoencoder, image: torch.Tensor, kl_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole loss, and its L1 part alone."""
    with mixed_precision(image.device.type):
        mean, logvar = network.posterior(image)
        output = network.decoder(mean + torch.randn_like(mean) * (0.5 * logvar).exp())
    error = output.float() - image
    l1 = error.abs().mean()
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()
    return l1 + 0.5 * gradient + kl_weight * kl, l1


def main() -> None:
    parser = training_arguments(__doc__, minutes=34, batch=16, rate=6e-4)
    parser.add_argument("--kl", type=float, default=5e-4)
    args = parser.parse_args()

    faces = load_faces(args.work)
    rng = np.random.default_rng(time.time_ns())
    network = place(FaceAutoencoder(), args.device)
    average = Average(network)
    optimizer = adamw(network, 1e-3)
    parts = {"network": network, "average": average.network, "optimizer": optimizer}
    clock = Clock(args.minutes, args.rate, floor=1e-6)
    run = Run(args.work / "autoencoder.ckpt", parts, clock)
    probe = held_out(args.work, 10, 32).to(args.device)

    def save() -> None:
        with torch.no_grad():
            value = psnr(average.network.decode(average.network.encode(probe)), probe)
        print(f"held-out PSNR {value:.2f} dB", flush=True)
        run.save()

    for _, image in batches(faces, args.batch, rng, jitter=8):
        if not run.begin_step(optimizer):
            break
        loss, l1 = loss_of(network, image.to(args.device), args.kl)
        backward(loss, optimizer, network)
        average.update(network, run.step)
        run.step += 1
        if run.step % 50 == 0:
            run.log(loss=loss.item(), l1=l1.item())
        if run.step % 400 == 0:
            save()
    save()

    # Unit-variance latents, channel by channel, over the training set.
    with torch.no_grad():
        stream = batches(faces, 64, rng)
        posterior = average.network.posterior
        latents = torch.cat([posterior(next(stream)[1].to(args.device))[0] for _ in range(32)])
        average.network.latent_mean.copy_(latents.mean((0, 2, 3), keepdim=True))
        average.network.latent_std.copy_(latents.std((0, 2, 3), keepdim=True))
    save_checkpoint(args.work / "autoencoder.pt", average.network.state_dict())


if __name__ == "__main__":
    main()
