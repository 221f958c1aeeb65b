"""What a better latent than the encoder's would bring to recovery, and what finding it costs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffveil.bundle import Bundle
from diffveil_export.models.embedded import load_embedded

__all__ = ["refinement"]

_RATE = 0.02


def refinement(
    bundle: Bundle, crops: NDArray[np.uint8], steps: tuple[int, ...] = (0, 5, 20)
) -> list[dict[str, Any]]:
    """PSNR after so many gradient steps on the latent, through the decoder, towards the photo.

    Exact samplers return the latent that they were given, so a recovered photo is as good as the
    latent; the decoder that recovers stays as it is.

    Args:
        bundle: Of the reference family.
        crops: Aligned faces, uint8 [N, S, S, 3].
        steps: Numbers of steps of Adam, ascending.

    Returns:
        For each: ``steps``, mean ``psnr`` in dB, ``milliseconds`` a face spent on all of them.
    """
    components = load_embedded(bundle)
    photo = torch.from_numpy(crops.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    latent = components.autoencoder.encode(photo).detach().requires_grad_(True)
    optimizer = torch.optim.Adam([latent], lr=_RATE)
    records, done, spent = [], 0, 0.0
    for wanted in steps:
        started = time.perf_counter()
        for _ in range(wanted - done):
            loss = (components.autoencoder.decode(latent) - photo).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        spent, done = spent + time.perf_counter() - started, wanted
        with torch.no_grad():
            error = (components.autoencoder.decode(latent).clamp(-1, 1) - photo) / 2
        psnr = -10 * error.square().mean((1, 2, 3)).log10()
        records.append(
            {
                "steps": wanted,
                "psnr": float(psnr.mean()),
                "milliseconds": 1000 * spent / len(crops),
            }
        )
    return records
