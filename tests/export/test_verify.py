"""Parity as data, and an export that fails when it must."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU
from diffveil.parity import TOLERANCES, compare
from diffveil_export.components import Components
from diffveil_export.exporter import export_bundle
from diffveil_export.verify import ParityError, check_program, require_parity
from diffveil_export.wrappers import wrap
from tiny_models import tiny_components

TOLERANCE = TOLERANCES["float32"].max_rel


def _compare(expected: np.ndarray, actual: np.ndarray) -> bool:
    return bool(compare("p", "o", 1, expected, actual))


def test_compare_measures(rng: np.random.Generator) -> None:
    expected = rng.standard_normal((4, 5)).astype(np.float32)
    row = compare("p", "o", 4, expected, expected)
    assert row
    assert row.max_abs == 0
    assert row.psnr is None
    actual = expected.copy()
    actual[2, 3] += 1e-3
    row = compare("p", "o", 4, expected, actual)
    assert row.max_abs == pytest.approx(1e-3, rel=1e-3)
    assert row.max_rel == pytest.approx(1e-3 / np.abs(expected).max(), rel=1e-3)
    mse = (actual.astype(float) - expected) ** 2
    peak = float(np.abs(expected).max())
    assert row.psnr == pytest.approx(10 * np.log10(peak**2 / mse.mean()), rel=1e-6)
    assert not row


def test_compare_refuses_other_dtypes_shapes_and_nan() -> None:
    ones = np.ones((2, 3), np.float32)
    assert _compare(ones, ones * np.float32(1 + TOLERANCE / 2))
    assert not _compare(ones, ones * np.float32(1 + TOLERANCE * 2))
    assert not _compare(ones, ones.astype(np.float16))
    assert not _compare(ones, ones.T)
    assert not _compare(ones, ones * np.nan)
    assert not _compare(ones * np.inf, ones * np.inf)
    assert not _compare(ones * 0, ones)


def test_sixteen_bits_are_judged_by_direction_and_length(rng: np.random.Generator) -> None:
    expected = rng.standard_normal((2, 400)).astype(np.float32)
    noise = rng.standard_normal((2, 400)).astype(np.float32)

    def row(actual: np.ndarray, precision: str = "float16") -> bool:
        return bool(compare("p", "o", 2, expected, actual.astype(np.float32), precision))

    assert row(expected + 1e-2 * noise)
    assert not row(expected + 1e-2 * noise, "float32")
    assert not row(expected + 6e-2 * noise)  # a cosine of about 0.998
    assert row(expected + 6e-2 * noise, "bfloat16")
    assert not row(expected * 1.02)
    assert row(expected * 1.02, "bfloat16")
    # One bad face of a batch is not averaged away, however small it is.
    small = expected * np.array([[1.0], [1e-6]], np.float32)
    swapped = small.copy()
    swapped[1] = -swapped[1]
    result = compare("p", "o", 2, small, swapped, "float16")
    assert result.max_rel < 1e-4
    assert result.cosine == pytest.approx(-1)
    assert not result


def test_another_networks_program_is_found_out(tiny_bundle: Bundle) -> None:
    engine = ONNXRuntimeCPU(threads=1).load(tiny_bundle, "decode")
    other = tiny_components(seed=1)
    rows = check_program(wrap(other, "decode"), engine, tiny_bundle.dimensions)
    assert not any(rows)
    with pytest.raises(ParityError, match=r"decode\.image \(batch 1, float32\)"):
        require_parity(rows)


class _Drifting(nn.Module):
    """A recognizer whose second call differs from its first: no export of it can be right."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = self.inner(image)
        return embedding if torch.compiler.is_exporting() else embedding.roll(1, 1)


@pytest.mark.slow
def test_failed_parity_leaves_no_bundle(tmp_path: Path) -> None:
    from dataclasses import replace

    components: Components = tiny_components()
    broken = replace(components, recognizer=_Drifting(components.modules()["recognizer"]))
    with pytest.raises(ParityError, match=r"recognize\.embedding"):
        export_bundle(broken, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
