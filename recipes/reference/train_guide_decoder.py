"""Train a narrow decoder that `guide` can go through instead of the real one.

    python recipes/reference/train_guide_decoder.py --work .work/reference --minutes 12
    diffveil export .work/reference/model --guide-decoder .work/reference/guide-decoder -o BUNDLE

Needs `autoencoder.pt` (or `decoder.pt`), `recognizer.pt` and the `latents.npy` that
train_diffusion.py leaves. The aim is what the real decoder shows, as the recognizer sees it:
pixels, and the embedding. Part of the latents carries a little noise, because guidance asks about
the diffusion model's estimates, not about photos. Writes the folder `guide-decoder`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from assemble import write_part
from common import (
    Average,
    Clock,
    Run,
    adamw,
    autoencoder_file,
    backward,
    held_out,
    load_autoencoder,
    load_recognizer,
    mixed_precision,
    place,
    psnr,
    save_sheet,
    training_arguments,
)

from diffveil_export.reference.autoencoder import FaceDecoder


def main() -> None:
    parser = training_arguments(__doc__, minutes=12, batch=32, rate=2e-3)
    parser.add_argument("--noise", type=float, default=0.4, help="most that latents are noised by")
    args = parser.parse_args()
    device = args.device

    real = place(load_autoencoder(autoencoder_file(args.work)), device)
    real.eval().requires_grad_(False)
    recognizer = place(load_recognizer(args.work).fuse().requires_grad_(False), device)

    latents = np.load(args.work / "latents.npy", mmap_mode="r")  # [N, 2 flips, C, s, s]
    network = place(FaceDecoder(), device)
    average = Average(network)
    optimizer = adamw(network, 1e-4)
    parts = {"network": network, "average": average.network, "optimizer": optimizer}
    run = Run(args.work / "guide-decoder.ckpt", parts, Clock(args.minutes, args.rate, floor=1e-6))
    rng = np.random.default_rng(time.time_ns())
    probe = real.encode(held_out(args.work, 10, 32).to(device))

    def save() -> None:
        with torch.no_grad():
            output, aim = average.network.decode(probe), real.decode(probe)
            same = (recognizer(output) * recognizer(aim)).sum(1).mean()
        print(
            f"held-out, against the real decoder: {psnr(output, aim):.2f} dB, cosine {same:.3f}",
            flush=True,
        )
        save_sheet(args.work / "guide-decoder.png", [aim[:10], output[:10]])
        run.save()
        write_part(args.work / "guide-decoder", average.network)

    while run.begin_step(optimizer):
        rows = rng.choice(len(latents), args.batch, replace=False)
        latent = torch.from_numpy(latents[rows, rng.integers(0, 2, args.batch)]).float().to(device)
        share = args.noise * torch.rand(args.batch, 1, 1, 1, device=device)
        share[: args.batch // 2] = 0
        latent = (1 - share**2).sqrt() * latent + share * torch.randn_like(latent)
        with mixed_precision(device), torch.no_grad():
            aim = real.decode(latent.to(memory_format=torch.channels_last)).float()
            known = recognizer(aim)
        with mixed_precision(device):
            output = network.decode(latent.to(memory_format=torch.channels_last)).float()
            seen = recognizer(output)
        pixel = (output - aim).abs().mean()
        identity = 1 - F.cosine_similarity(seen.float(), known.float()).mean()
        backward(pixel + 0.1 * identity, optimizer, network)
        average.update(network, run.step)
        run.step += 1
        if run.step % 50 == 0:
            run.log(pixel=pixel.item(), identity=identity.item())
        if run.step % 500 == 0:
            save()
    save()


if __name__ == "__main__":
    main()
