from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffveil.batching import chunks, in_chunks
from diffveil.errors import OptionError


@given(groups=st.integers(0, 60), group=st.integers(1, 5), spare=st.integers(0, 20))
def test_chunks_cover_all_rows_in_few_even_runs(groups: int, group: int, spare: int) -> None:
    rows, limit = groups * group, group + spare
    found = chunks(rows, limit, group)
    assert [row for run in found for row in range(rows)[run]] == list(range(rows))
    sizes = [run.stop - run.start for run in found]
    assert all(0 < size <= limit and size % group == 0 for size in sizes)
    assert len(found) == -(-groups // (limit // group))
    assert not sizes or max(sizes) - min(sizes) <= group


def test_a_group_larger_than_a_batch_is_refused() -> None:
    with pytest.raises(OptionError, match="5 rows must go through a program together"):
        chunks(10, 4, 5)


@pytest.mark.parametrize("rows", [1, 4, 5, 11])
def test_in_chunks_equals_one_call(rows: int, rng: np.random.Generator) -> None:
    sizes = []

    def program(*, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        sizes.append(len(a))
        return np.asarray(a + 2 * b)

    a, b = rng.standard_normal((2, rows, 3)).astype(np.float32)
    np.testing.assert_array_equal(in_chunks(program, 4, a=a, b=b), a + 2 * b)
    assert max(sizes) <= 4
    assert sum(sizes) == rows
