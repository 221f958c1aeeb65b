"""A fake GPU with everything that runs on it, and what its programs are fed with."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import diffveil.engines._cuda as cuda
from diffveil.engines import TensorRT
from diffveil.presets import PRESETS
from fake_cuda import FakeDriver
from fake_trt_runtime import TARGET, FakeTensorRT

__all__ = ["PLAN", "Machine", "crops", "driver_functions", "step_inputs"]

PLAN = replace(
    PRESETS["balanced"].anonymize.fitting(has_few=False, has_surrogates=False),
    sampler="ddim",
    steps=8,
    fresh_noise=0.7,
    redraws=0,
)
"""One gradient at every step, so that loops of `step` run it; short."""


class Machine:
    """A fake GPU, its driver and its TensorRT-RTX."""

    def __init__(self, **options: Any) -> None:
        self.driver = FakeDriver()
        self.trt = FakeTensorRT(self.driver)
        self.backend = TensorRT(
            options.pop("name", "tensorrt-rtx"),
            driver=self.driver,
            import_module=lambda name: self.trt,
            find_gpu=lambda ordinal: TARGET,
            **options,
        )

    def count(self, function: str) -> int:
        return self.driver.calls.get(function, 0)


def crops(rng: np.random.Generator, faces: int) -> np.ndarray:
    return rng.uniform(-1, 1, (faces, 3, 32, 32)).astype(np.float32)


def step_inputs(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Some value of everything that program `step` takes."""
    shape = (rows, 8, 4, 4)
    return {
        "timestep": np.full(rows, 500),
        "coefficients": rng.uniform(0, 0.5, (rows, 8)).astype(np.float32),
        "latent": rng.standard_normal(shape).astype(np.float32),
        "previous": rng.standard_normal(shape).astype(np.float32),
        "previous_epsilon": np.zeros(shape, np.float32),
        "noise": rng.standard_normal(shape).astype(np.float32),
        "background": rng.standard_normal(shape).astype(np.float32),
        "mask": rng.uniform(0, 1, (rows, 1, 4, 4)).astype(np.float32),
        "anchor": np.eye(rows, 20, dtype=np.float32),
        "repel": np.ones(rows, np.float32),
        "attract": np.zeros(rows, np.float32),
        "sibling": np.zeros((rows, rows), np.float32),
        "release": np.full(rows, 2, np.float32),
        "normalise": np.ones(rows, np.float32),
        "conditioning": rng.standard_normal((rows, 5, 24)).astype(np.float32),
    }


def driver_functions() -> set[str]:
    """All functions of the driver that are called anywhere."""
    return set(re.findall(r'"(cu[A-Z]\w+)"', Path(cuda.__file__).read_text(encoding="utf-8")))
