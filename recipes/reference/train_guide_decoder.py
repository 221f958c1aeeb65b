"""Train a narrow decoder that `guide` can go through instead of the real one.

    python recipes/reference/train_guide_decoder.py --work .work/reference --minutes 12
    diffveil export .work/reference/model --guide-decoder .work/reference/guide-decoder -o BUNDLE

Needs `autoencoder.pt` (or `decoder.pt`), `recognizer.pt` and the `latents.npy` that
train_diffusion.py leaves. The aim is what the real decoder shows, as the recognizer sees it:
pixels, and the embedding. Part of the latents carries a little noise, because guidance asks about
the diffusion model's estimates, not about photos. Writes the folder `guide-decoder`.
"""

from __future__ import annotations

import argparse
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
    backward,
    held_out,
    mixed_precision,
    psnr,
    save_sheet,
)

from diffveil_export.reference.autoencoder import FaceAutoencoder, FaceDecoder
from diffveil_export.reference.recognizer import FaceRecognizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(".work/reference"))
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.4, help="most that latents are noised by")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = args.device

    real = FaceAutoencoder().to(device, memory_format=torch.channels_last)
    sharpened = args.work / "decoder.pt"
    weights = sharpened if sharpened.exists() else args.work / "autoencoder.pt"
    real.load_state_dict(torch.load(weights, weights_only=True))
    real.eval().requires_grad_(False)
    weights = torch.load(args.work / "recognizer.pt", weights_only=True)
    recognizer = FaceRecognizer(embedding=weights["head.weight"].shape[0])
    recognizer.load_state_dict(weights)
    recognizer = recognizer.fuse().requires_grad_(False)
    recognizer.to(device, memory_format=torch.channels_last)

    latents = np.load(args.work / "latents.npy", mmap_mode="r")  # [N, 2 flips, C, s, s]
    network = FaceDecoder().to(device, memory_format=torch.channels_last)
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
