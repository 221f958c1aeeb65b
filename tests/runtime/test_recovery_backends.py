"""A key made by one arithmetic opens by another, on the embedded bundle's own weights.

Others than the CPU's float32 are stood in for by rounding what every program takes and returns to
the ten bits of fraction that TF32 and float16 keep, and by graphs that are not optimised, so that
sums run in another order.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from benchmarks._arithmetics import Rounded, Unoptimised, to_float16, to_tf32
from benchmarks.recovery import across

from diffveil import Protector
from diffveil.bundle import Bundle
from diffveil.engines import BackendWarning, ONNXRuntimeCPU, Programs
from diffveil.operations import FaceOperations
from diffveil.presets import PRESETS
from diffveil.recovery import CROSS_BACKEND_LOSS
from fake_photos import ListedDetector, Pixels
from fake_programs import FakeBackend, fake_bundle
from faulty_backends import FaultyBackend


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    """A face-like crop: what matters is arithmetic, not who it is."""
    rng = np.random.default_rng(5)
    coarse = rng.uniform(-0.8, 0.8, (3, 8, 8))
    grown = np.kron(coarse, np.ones((16, 16)))
    ramp = np.linspace(-0.2, 0.2, 128)
    return (grown + ramp + ramp[:, None])[None].astype(np.float32).clip(-1, 1)


OTHERS = {
    "sums in another order": Unoptimised(1),
    "float16": Rounded(to_float16, 1),
}


def test_rounding_keeps_ten_bits() -> None:
    assert to_tf32(np.float32([1 + 2**-10, 1 + 2**-12, -1e30])).tolist()[:2] == [1 + 2**-10, 1.0]
    assert to_float16(np.float32([1 + 2**-10, 1 + 2**-12])).tolist() == [1 + 2**-10, 1.0]


@pytest.mark.parametrize("name", OTHERS)
def test_keys_open_across_arithmetics_both_ways(name: str, face: np.ndarray) -> None:
    bundle, inversion = Bundle.load(), PRESETS["fast"].recovery
    with (
        Programs(bundle, ONNXRuntimeCPU(1)) as plain,
        Programs(bundle, OTHERS[name]) as other,
    ):
        here, there = FaceOperations(plain), FaceOperations(other)
        for maker, opener in ((here, there), (there, here)):
            loss, between = across(face, maker, opener, inversion)
            assert loss < CROSS_BACKEND_LOSS["float32"]
            assert between > 50


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


def test_a_backend_that_has_failed_is_not_asked_again(
    two: tuple[Bundle, FaultyBackend, FaultyBackend], detector: ListedDetector, group: Pixels
) -> None:
    bundle, fast, slow = two
    protector = Protector(Programs(bundle, fast, others=[slow]), detector=detector)
    made = protector.anonymize(group, seed=1)
    assert made.key is not None
    fast.fault = "run"
    with pytest.warns(BackendWarning):
        protector.anonymize(group, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = protector.recover(made.image, made.key)
    assert (back.backend, back.expected_loss) == ("slow", CROSS_BACKEND_LOSS["float32"])
    assert protector.programs.preferring("fast", "it was fast") is None
    again = protector.programs.preferring("slow", "it is left")
    assert again is not None
    assert again._pool.remaining == (slow,)


def test_where_it_cannot_run_the_expected_loss_is_said(
    two: tuple[Bundle, FaultyBackend, FaultyBackend], detector: ListedDetector, group: Pixels
) -> None:
    bundle, fast, slow = two
    made = Protector(Programs(bundle, slow), detector=detector).anonymize(group, seed=1)
    assert made.key is not None
    back = Protector(Programs(bundle, fast), detector=detector).recover(made.image, made.key)
    assert (back.backend, back.expected_loss) == ("fast", CROSS_BACKEND_LOSS["float32"])
    assert made.expected_loss is None
