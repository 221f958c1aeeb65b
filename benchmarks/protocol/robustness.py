"""What recompressing, scaling, noise and cropping do to protection, and to recovery."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import diffveil
from benchmarks._metrics import psnr
from benchmarks._recognizers import ARCFACE_TEMPLATE
from benchmarks.protocol.judges import Judge
from benchmarks.protocol.people import Pixels, Portrait
from diffveil.errors import KeyMismatchError
from diffveil.keys import RecoveryKey

__all__ = ["DISTURBANCES", "protection_under", "recovery_under", "refused_as_cut"]

_EDGE = 0.1  # of each side, cut away
_NOISE = 8.0  # standard deviation, levels of 255


def _jpeg(quality: int) -> Callable[[Pixels, NDArray[Any]], Pixels]:
    def disturb(pixels: Pixels, noise: NDArray[Any]) -> Pixels:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file).convert("RGB"))

    return disturb


def _halved(pixels: Pixels, noise: NDArray[Any]) -> Pixels:
    image = Image.fromarray(pixels)
    small = image.resize((max(1, image.width // 2), max(1, image.height // 2)))
    return np.asarray(small.resize(image.size))


def _noisy(pixels: Pixels, noise: NDArray[Any]) -> Pixels:
    return np.clip(np.rint(pixels + _NOISE * noise), 0, 255).astype(np.uint8)


def _cropped(pixels: Pixels, noise: NDArray[Any]) -> Pixels:
    """Black where it was cut away, so that the rest stays where it was."""
    height, width = pixels.shape[:2]
    inside = np.s_[
        round(height * _EDGE) : height - round(height * _EDGE),
        round(width * _EDGE) : width - round(width * _EDGE),
    ]
    result = np.zeros_like(pixels)
    result[inside] = pixels[inside]
    return result


#: By name: a photo, and standard normal noise of its shape, to a photo of the same size. Scaled
#: and cropped photos are put back in place, as recovery asks for.
DISTURBANCES: Mapping[str, Callable[[Pixels, NDArray[Any]], Pixels]] = MappingProxyType(
    {
        "none": lambda pixels, noise: pixels,
        "JPEG 95": _jpeg(95),
        "JPEG 75": _jpeg(75),
        "JPEG 50": _jpeg(50),
        "half size and back": _halved,
        "noise, σ 8 of 255": _noisy,
        "10 % cut off every edge": _cropped,
    }
)


def _disturb(name: str, pixels: Pixels, index: int) -> Pixels:
    noise = np.random.default_rng(index).standard_normal(pixels.shape)
    return DISTURBANCES[name](pixels, noise)


def protection_under(
    portraits: list[Portrait], judge: Judge, operations: Sequence[str], far: float
) -> dict[str, dict[str, Any]]:
    """Rates by disturbance and operation; probes are disturbed, the gallery is not.

    Args:
        portraits: Those with outputs, first in the judge's gallery.
        judge: A recognizer that has looked.
        operations: Names of outputs, `original` among them as a control.
        far: False accept rate of the threshold.
    """
    rows = np.arange(len(portraits))
    found: dict[str, dict[str, Any]] = {}
    for name in DISTURBANCES:
        found[name] = {}
        for operation in operations:
            if name == "none":
                vectors = judge.vectors[operation]
            else:
                disturbed = [
                    Portrait(
                        p.person, _disturb(name, p.outputs.get(operation, p.pixels), i), p.face
                    )
                    for i, p in enumerate(portraits)
                ]
                vectors = judge.of_photos(disturbed, "original")
            rates = judge.gallery.rates(vectors, rows, (far,))["at"][f"{far:g}"]
            found[name][operation] = {k: rates[k] for k in ("same_photo", "other_photos")}
    return found


def recovery_under(
    protector: diffveil.Protector,
    portraits: list[Portrait],
    keys: list[RecoveryKey],
    judge: Judge,
    far: float,
) -> dict[str, dict[str, Any]]:
    """PSNR of the recovered face to the original's in dB, and its match rate, by disturbance."""
    rows = np.arange(len(portraits))
    found = {}
    for name in DISTURBANCES:
        recovered = []
        for index, (portrait, key) in enumerate(zip(portraits, keys, strict=True)):
            photo = _disturb(name, portrait.outputs["anonymize"], index)
            pixels = np.asarray(protector.recover(photo, key, reencoded=True).image.convert("RGB"))
            recovered.append(Portrait(portrait.person, pixels, portrait.face))
        noise = [
            psnr(
                r.crop("original", ARCFACE_TEMPLATE, 112),
                p.crop("original", ARCFACE_TEMPLATE, 112),
            )
            for r, p in zip(recovered, portraits, strict=True)
        ]
        rates = judge.gallery.rates(judge.of_photos(recovered, "original"), rows, (far,))
        found[name] = {
            "psnr": float(np.mean(noise)),
            "same_photo": rates["at"][f"{far:g}"]["same_photo"],
        }
    return found


def refused_as_cut(
    protector: diffveil.Protector, portraits: list[Portrait], keys: list[RecoveryKey]
) -> float:
    """Share of keys that recovery refuses for a photo of another size, as scaling leaves it."""
    refused = 0
    for portrait, key in zip(portraits, keys, strict=True):
        photo = portrait.outputs["anonymize"]
        try:
            protector.recover(np.ascontiguousarray(photo[:-1]), key, reencoded=True)
        except KeyMismatchError:
            refused += 1
    return refused / len(portraits)
