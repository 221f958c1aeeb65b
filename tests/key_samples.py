"""Recovery keys of random numbers, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffveil.keys import FaceKey, Picture, RecoveryKey


def make_face(rng: np.random.Generator, **changes: Any) -> FaceKey:
    """A face of O-BELM at toy sizes; `changes` replace fields."""
    fields: dict[str, Any] = {
        "tokens": rng.standard_normal((10, 24)).astype(np.float16),
        "latents": rng.standard_normal((2, 4, 4, 4)).astype(np.float32),
        "matrix": np.array([[0.5, -0.1, 30.0], [0.1, 0.5, -12.0]]) + rng.uniform(0, 0.01, (2, 3)),
        "box": (10.5, 20.25, 90.0, 120.0),
        "landmarks": rng.uniform(0, 100, (5, 2)),
    }
    return FaceKey(**{**fields, **changes})


def make_picture(rng: np.random.Generator) -> Picture:
    return Picture(rng.bytes(32), rng.bytes(192))


def make_key(rng: np.random.Generator, **changes: Any) -> RecoveryKey:
    """A key of two such faces; `changes` replace fields."""
    fields: dict[str, Any] = {
        "faces": (make_face(rng), make_face(rng, number=1)),
        "bundle": rng.bytes(32).hex(),
        "sampler": "o-belm",
        "steps": 8,
        "photo_size": (480, 640),
        "pictures": (make_picture(rng),),
        "backend": "onnxruntime-cpu",
        "precision": "float32",
    }
    return RecoveryKey(**{**fields, **changes})
