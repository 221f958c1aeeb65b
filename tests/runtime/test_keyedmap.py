from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffveil.errors import OptionError
from diffveil.keyedmap import KeyedMap
from diffveil.noise import NoiseKey

SEEDS = st.integers(0, 2**64)
ROWS = st.integers(1, 80).flatmap(
    lambda n: arrays(np.float32, (3, n), elements=st.floats(-100, 100, width=32))
)


def keyed(seed: int, size: int) -> KeyedMap:
    return KeyedMap(NoiseKey.from_seed(seed), size)


@given(SEEDS, ROWS)
def test_undo_gives_back_every_bit(seed: int, values: np.ndarray) -> None:
    one = keyed(seed, values.shape[1])
    # Bits, not numbers: zero keeps its sign too.
    assert one.undo(one.apply(values)).tobytes() == values.tobytes()
    assert one.apply(one.undo(values)).tobytes() == values.tobytes()


@given(SEEDS, ROWS)
def test_nothing_but_place_and_sign_changes(seed: int, values: np.ndarray) -> None:
    mapped = keyed(seed, values.shape[1]).apply(values)
    np.testing.assert_array_equal(np.sort(np.abs(mapped)), np.sort(np.abs(values)))


@given(SEEDS, st.integers(1, 60))
def test_it_is_a_linear_orthogonal_map(seed: int, size: int) -> None:
    matrix = keyed(seed, size).apply(np.eye(size, dtype=np.float32))
    np.testing.assert_array_equal(matrix @ matrix.T, np.eye(size))


@given(SEEDS)
def test_it_depends_on_the_key_alone(seed: int) -> None:
    values = np.arange(500, dtype=np.float32) + 1
    first = keyed(seed, 500).apply(values)
    keyed(seed + 1, 7).apply(np.ones(7, dtype=np.float32))
    np.testing.assert_array_equal(keyed(seed, 500).apply(values), first)
    other = keyed(seed + 1, 500)
    assert (other.apply(values) == first).mean() < 0.05
    assert (other.undo(first) == values).mean() < 0.05


def test_places_and_signs_are_even() -> None:
    size, maps = 16, 600
    matrices = [keyed(seed, size).apply(np.eye(size, dtype=np.float32)) for seed in range(maps)]
    hits = np.abs(matrices).sum(axis=0)
    # Chi-square with 15² degrees of freedom: mean 225, standard deviation 21.
    assert (((hits - maps / size) ** 2) / (maps / size)).sum() < 225 + 6 * 21
    assert abs(np.sum(matrices)) < 6 * np.sqrt(maps * size)


def test_wrong_sizes_are_errors() -> None:
    with pytest.raises(OptionError, match="0 coordinates"):
        keyed(0, 0)
    with pytest.raises(OptionError, match=r"\[2, 3\], expected a last axis of 4"):
        keyed(0, 4).apply(np.zeros((2, 3), dtype=np.float32))
    with pytest.raises(OptionError, match="expected a last axis of 4"):
        keyed(0, 4).undo(np.zeros(5, dtype=np.float32))
