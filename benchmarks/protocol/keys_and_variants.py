"""Recovery with wrong keys, and how much variants of one face differ."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import diffveil
from benchmarks._metrics import psnr
from benchmarks.protocol.judges import Judge
from benchmarks.protocol.people import Pixels, strangers
from benchmarks.protocol.perception import gmsd
from diffveil.noise import NoiseKey
from diffveil.plans import Preset
from diffveil.scenes import to_images, to_pixels

__all__ = ["diversity", "wrong_keys"]

_BATCH = 8


def wrong_keys(
    protector: diffveil.Protector,
    crops: Pixels,
    people: list[str],
    judges: list[Judge],
    preset: Preset,
    far: float,
) -> list[dict[str, Any]]:
    """Recovery with each half of the key right, another person's, or drawn at random.

    Args:
        protector: What recovers.
        crops: The bundle's aligned originals, uint8 [N, S, S, 3]; first in the judges' galleries.
        people: Person of each.
        judges: Recognizers that have looked.
        preset: Its recovery plan is used.
        far: False accept rate of the thresholds.

    Returns:
        For each combination PSNR to the original in dB, and by judge the rate `own` at which the
        result matches the original and `owner` at which it matches the other person.
    """
    operations, inversion = protector.operations, preset.recovery
    parts = [
        operations.invert(to_images(crops[i : i + _BATCH]), inversion)
        for i in range(0, len(crops), _BATCH)
    ]
    tokens, latents = (np.concatenate(half) for half in zip(*parts, strict=True))
    other, rows = strangers(people), np.arange(len(crops))
    drawn = np.random.default_rng(0).standard_normal(latents.shape).astype(np.float32)
    trials: dict[tuple[str, str], tuple[NDArray[Any], NDArray[Any]]] = {
        ("right", "right"): (tokens, latents),
        ("another person's", "right"): (tokens[other], latents),
        ("right", "another person's"): (tokens, latents[other]),
        ("another person's", "another person's"): (tokens[other], latents[other]),
        # Of key-I's spread, so that only its pattern is wrong.
        ("right", "random"): (tokens, drawn * latents.std()),
    }
    records = []
    for (key_e, key_i), (e, i) in trials.items():
        out = np.concatenate(
            [
                to_pixels(operations.recover(e[s : s + _BATCH], i[s : s + _BATCH], inversion))
                for s in range(0, len(crops), _BATCH)
            ]
        )
        rates = {}
        for judge in judges:
            vectors = judge.of_crops(out)
            own, owner = (
                judge.gallery.rates(vectors, to, (far,))["at"][f"{far:g}"]["same_photo"]
                for to in (rows, other)
            )
            rates[judge.name] = {"own": own, "owner": owner}
        noise = float(np.mean([psnr(a, b) for a, b in zip(out, crops, strict=True)]))
        records.append({"key_e": key_e, "key_i": key_i, "psnr": noise, "rates": rates})
    return records


def diversity(
    protector: diffveil.Protector,
    crops: Pixels,
    judges: list[Judge],
    preset: Preset,
    far: float,
    variants: int = 4,
) -> dict[str, Any]:
    """How unlike the anonymized variants of one face are, and faces made of different ones.

    Args:
        protector: What anonymizes.
        crops: The bundle's aligned originals, uint8 [N, S, S, 3].
        judges: Recognizers that have looked.
        preset: Its plan for anonymizing is used.
        far: False accept rate of the thresholds.
        variants: Of each face.

    Returns:
        `gmsd` among variants; by judge the mean cosine among `variants` of one face and the share
        of these pairs that match, and the same of first variants of different faces (`strangers`):
        faces made of nobody should be no more alike than people are.
    """
    made = []
    for start in range(0, len(crops), _BATCH):
        images = to_images(crops[start : start + _BATCH])
        keys = [NoiseKey.from_seed(start + i) for i in range(len(images))]
        out = protector.operations.anonymize(images, preset.anonymize, keys=keys, variants=variants)
        made.append(
            to_pixels(out.reshape(-1, *out.shape[2:])).reshape(
                len(images), variants, *crops.shape[1:]
            )
        )
    faces = np.concatenate(made)
    first, second = np.triu_indices(variants, 1)
    apart = [gmsd(f[a], f[b]) for f in faces for a, b in zip(first, second, strict=True)]
    report: dict[str, Any] = {
        "faces": len(crops),
        "variants": variants,
        "gmsd": float(np.mean(apart)),
        "judges": {},
    }
    for judge in judges:
        vectors = judge.of_crops(faces.reshape(-1, *crops.shape[1:]))
        vectors = vectors.reshape(len(crops), variants, -1)
        limit = judge.gallery.threshold(far)
        siblings = np.einsum("nve,nwe->nvw", vectors, vectors)[:, first, second]
        among = (vectors[:, 0] @ vectors[:, 0].T)[np.triu_indices(len(crops), 1)]
        report["judges"][judge.name] = {
            "variants": {
                "cosine": float(siblings.mean()),
                "match": float((siblings > limit).mean()),
            },
            "strangers": {"cosine": float(among.mean()), "match": float((among > limit).mean())},
            "originals": {"cosine": float(judge.gallery.impostors.mean()), "match": far},
        }
    return report
