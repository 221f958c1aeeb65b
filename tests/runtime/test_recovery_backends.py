"""A key made by one arithmetic opens by another, on the embedded bundle's own weights.

Others than the CPU's float32 are stood in for by rounding what every program takes and returns to
the ten bits of fraction that TF32 and float16 keep, and by graphs that are not optimised, so that
sums run in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from diffveil import Protector
from diffveil.bundle import Bundle
from diffveil.engines import Array, Engine, ONNXRuntimeCPU, Programs
from diffveil.operations import FaceOperations
from diffveil.presets import PRESETS
from diffveil.programs import ProgramSpec
from diffveil.recovery import CROSS_BACKEND_LOSS
from fake_photos import ListedDetector, Pixels
from fake_programs import FakeBackend, fake_bundle
from faulty_backends import FaultyBackend

Rounding = Callable[[Array], Array]


def to_float16(array: Array) -> Array:
    return array.astype(np.float16).astype(np.float32)


def to_tf32(array: Array) -> Array:
    """Round to nearest at the tenth bit of the fraction; float32's range stays."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


class _Rounded(ONNXRuntimeCPU):
    def __init__(self, rounding: Rounding) -> None:
        super().__init__(1)
        self._rounding = rounding

    def load(self, bundle: Bundle, program: str) -> Engine:
        return _RoundedEngine(super().load(bundle, program), self._rounding)


class _RoundedEngine:
    def __init__(self, inner: Engine, rounding: Rounding) -> None:
        self._inner, self._rounding = inner, rounding

    @property
    def program(self) -> ProgramSpec:
        return self._inner.program

    def run(self, **inputs: Array) -> dict[str, Array]:
        rounded = {n: self._rounding(a) if a.dtype == np.float32 else a for n, a in inputs.items()}
        return {n: self._rounding(a) for n, a in self._inner.run(**rounded).items()}

    def close(self) -> None:
        self._inner.close()


class _Unoptimised(ONNXRuntimeCPU):
    def options(self) -> Any:
        options = super().options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return options


def psnr(one: Array, other: Array) -> float:
    return float(-10 * np.log10(np.mean(np.square(one - other, dtype=np.float64)) / 4))


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    """A face-like crop: what matters is arithmetic, not who it is."""
    rng = np.random.default_rng(5)
    coarse = rng.uniform(-0.8, 0.8, (3, 8, 8))
    grown = np.kron(coarse, np.ones((16, 16)))
    ramp = np.linspace(-0.2, 0.2, 128)
    return (grown + ramp + ramp[:, None])[None].astype(np.float32).clip(-1, 1)


OTHERS = {
    "sums in another order": _Unoptimised(1),
    "TF32": _Rounded(to_tf32),
    "float16": _Rounded(to_float16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_keys_open_across_arithmetics_both_ways(name: str, face: np.ndarray) -> None:
    bundle, inversion = Bundle.load(), PRESETS["fast"].recovery
    with (
        Programs(bundle, ONNXRuntimeCPU(1)) as plain,
        Programs(bundle, OTHERS[name]) as other,
    ):
        here, there = FaceOperations(plain), FaceOperations(other)
        for maker, opener in ((here, there), (there, here)):
            key = maker.invert(face, inversion)
            own = psnr(maker.recover(*key, inversion), face)
            across = psnr(opener.recover(*key, inversion), face)
            assert own > 15  # it is a recovery at all
            assert own - across < CROSS_BACKEND_LOSS["float32"]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Bundle, FaultyBackend, FaultyBackend]:
    fake = FakeBackend()
    fast, slow = FaultyBackend(fake, "fast"), FaultyBackend(fake, "slow")
    return fake_bundle(tmp_path / "bundle"), fast, slow


def test_recovery_prefers_the_backend_that_made_the_key(
    two: tuple[Bundle, FaultyBackend, FaultyBackend], detector: ListedDetector, group: Pixels
) -> None:
    bundle, fast, slow = two
    with Protector(Programs(bundle, slow), detector=detector) as maker:
        made = maker.anonymize(group, seed=1)
    assert made.key is not None
    assert (made.key.backend, made.key.precision) == ("slow", "float32")
    protector = Protector(Programs(bundle, fast, others=[slow]), detector=detector)
    back = protector.recover(made.image, made.key)
    assert (back.backend, back.expected_loss) == ("slow", None)
    assert back.backend_reason == "it made the key"
    assert protector.backend == "fast"
    again = protector.anonymize(group, seed=1)
    assert again.backend == "fast"
    before = len(slow.loaded)
    protector.recover(made.image, made.key)
    assert len(slow.loaded) == before  # its engines are kept
    protector.close()
    assert slow.open == fast.open == 0


def test_where_it_cannot_run_the_expected_loss_is_said(
    two: tuple[Bundle, FaultyBackend, FaultyBackend], detector: ListedDetector, group: Pixels
) -> None:
    bundle, fast, slow = two
    made = Protector(Programs(bundle, slow), detector=detector).anonymize(group, seed=1)
    assert made.key is not None
    back = Protector(Programs(bundle, fast), detector=detector).recover(made.image, made.key)
    assert (back.backend, back.expected_loss) == ("fast", CROSS_BACKEND_LOSS["float32"])
    assert made.expected_loss is None
