from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffveil.denoising import Denoiser
from diffveil.engines import Programs
from fake_programs import FakeBackend, fake_programs


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return fake_programs(tmp_path)


@pytest.fixture
def backend(programs: Programs) -> FakeBackend:
    assert isinstance(programs.backend, FakeBackend)
    return programs.backend


def test_conditioning_is_that_of_the_stage_above_and_unconditional_below(
    programs: Programs, backend: FakeBackend, rng: np.random.Generator
) -> None:
    tokens = rng.standard_normal((2, 10, 6)).astype(np.float32)
    x = rng.standard_normal((6, 8, 4, 4)).astype(np.float32)
    denoise = Denoiser(programs, tokens, [581, 501, 401, 400, 1], conditional_above=400, variants=3)
    for timestep in (581, 501, 401, 400, 1):
        denoise(x, timestep)
    calls = backend.inputs("denoise")
    for call, stage in zip(calls[:3], (5, 5, 4), strict=True):
        expected = backend.expand(tokens[:, stage])["conditioning"].repeat(3, axis=0)
        np.testing.assert_allclose(call["conditioning"], expected, rtol=1e-6)
    for call in calls[3:]:
        np.testing.assert_array_equal(call["conditioning"], np.full((6, 3, 5), 0.25, np.float32))
    assert [call["timestep"].tolist() for call in calls] == [
        [t] * 6 for t in (581, 501, 401, 400, 1)
    ]


def test_tokens_are_expanded_once_and_only_for_the_stages_that_are_visited(
    programs: Programs, backend: FakeBackend, rng: np.random.Generator
) -> None:
    tokens = rng.standard_normal((2, 10, 6)).astype(np.float32)
    denoise = Denoiser(programs, tokens, [999, 950, 420, 399], conditional_above=400)
    x = rng.standard_normal((2, 8, 4, 4)).astype(np.float32)
    for timestep in (999, 950, 420):
        denoise(x, timestep)
    (call,) = backend.inputs("expand")
    np.testing.assert_array_equal(call["tokens"], tokens[:, [4, 9]].reshape(4, 6))


def test_nothing_is_expanded_for_an_unconditional_run(
    programs: Programs, backend: FakeBackend, rng: np.random.Generator
) -> None:
    tokens = rng.standard_normal((1, 10, 6)).astype(np.float32)
    Denoiser(programs, tokens, [300, 1], conditional_above=400)
    assert not backend.inputs("expand")


def test_batches_are_bounded_and_do_not_change_the_prediction(
    programs: Programs, backend: FakeBackend, rng: np.random.Generator
) -> None:
    tokens = rng.standard_normal((5, 10, 6)).astype(np.float32)
    x = rng.standard_normal((5, 8, 4, 4)).astype(np.float32)
    whole = Denoiser(programs, tokens, [500])(x, 500)
    backend.calls.clear()
    parts = Denoiser(programs, tokens, [500], max_batch=2)(x, 500)
    np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6)
    assert all(len(next(iter(inputs.values()))) <= 2 for _, inputs in backend.calls)
