"""Weights in four bits: what is rounded comes back, and rounding is as good as it can be."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st

from diffveil_export.blocks import (
    BLOCK,
    GREATEST,
    fit_blocks,
    pack,
    read_blocks,
    restore_blocks,
    unpack,
)

SHAPES = [(3, 2 * BLOCK), (BLOCK, 5), (2, 3 * BLOCK, 3, 3)]


@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-30, 12),
    which=st.integers(0, len(SHAPES) - 1),
    zeros=st.booleans(),
)
def test_rounding_again_changes_nothing(seed: int, exponent: int, which: int, zeros: bool) -> None:
    shape = SHAPES[which]
    axis = 0 if which == 1 else 1
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    weight *= np.float32(2.0) ** exponent
    if zeros:
        np.moveaxis(weight, axis, -1)[..., :BLOCK] = 0
    rounded = restore_blocks(*fit_blocks(weight, axis), axis)
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(restore_blocks(*fit_blocks(rounded, axis), axis), rounded)
    found = read_blocks(rounded, axis)
    assert found is not None
    integers, scale = found
    assert scale.dtype == np.float16
    assert np.abs(integers).max() <= 7
    np.testing.assert_array_equal(restore_blocks(integers, scale, axis), rounded)


def test_no_other_scale_of_a_block_is_much_better(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((40, BLOCK)).astype(np.float32)
    rounded = restore_blocks(*fit_blocks(weight, 1), 1)
    scales = np.linspace(0.05, 0.6, 400)[:, None, None]
    tried = np.clip(np.rint(weight / scales), -7, 7) * scales
    best = np.square(tried - weight).sum(-1).min(0)
    error = np.square(rounded - weight).sum(-1)
    # Seven shares of the largest weight are tried here, hundreds of scales there.
    assert error.sum() < 1.15 * best.sum()
    plain = np.abs(weight).max(-1, keepdims=True) / 7
    assert error.sum() < np.square(np.rint(weight / plain) * plain - weight).sum()


def test_weights_that_were_not_rounded_are_not_read(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((4, BLOCK)).astype(np.float32)
    assert read_blocks(weight, 1) is None
    assert read_blocks(weight[:, :-1], 1) is None  # no whole blocks
    rounded = restore_blocks(*fit_blocks(weight, 1), 1)
    rounded[2, 3] += np.float32(1e-6)
    assert read_blocks(rounded, 1) is None
    for value in (np.inf, np.nan, 2 * GREATEST):
        rounded[2, 3] = value
        assert read_blocks(rounded, 1) is None


def test_packing_is_that_of_onnx(rng: np.random.Generator) -> None:
    integers = rng.integers(-8, 8, (6, 10)).astype(np.int8)
    raw = pack(integers)
    assert raw == ir.tensor(integers.astype(ir.DataType.INT4.numpy())).tobytes()
    np.testing.assert_array_equal(unpack(raw).reshape(6, 10), integers)
    np.testing.assert_array_equal(unpack(np.frombuffer(raw, np.uint8)).reshape(6, 10), integers)
