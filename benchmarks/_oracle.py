"""The published recipe on a bundle's own weights, in plain PyTorch: the thing to be faster than."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from diffveil.bundle import Bundle
from diffveil_export.models.embedded import load_embedded
from diffveil_export.oracle import anonymize, invert

__all__ = ["paper_seconds"]

_RELEASED_VARIANTS = 4


def paper_seconds(bundle: Bundle, crop: NDArray[np.uint8], repeats: int = 1) -> tuple[float, float]:
    """Median seconds of anonymizing one face [S, S, 3], 50 steps at strength 0.6.

    Returns:
        One variant and no key; and the recipe as it was released: four variants, and the recovery
        key by 50 steps of inversion.
    """
    # The published gradient goes through the whole decoder, whatever this bundle's guide does.
    components = replace(load_embedded(bundle), guide_decoder=None)
    image = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    shape = components.autoencoder.encode(image).shape[1:]
    noise = torch.randn((1, _RELEASED_VARIANTS, *shape), generator=torch.Generator().manual_seed(0))
    one, released = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        anonymize(components, image, noise[:, :1])
        one.append(time.perf_counter() - started)
        started = time.perf_counter()
        invert(components, image, steps=50)
        anonymize(components, image, noise)
        released.append(time.perf_counter() - started)
    return float(np.median(one)), float(np.median(released))
