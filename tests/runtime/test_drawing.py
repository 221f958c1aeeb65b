"""Faces that do not meet `accept` or `natural` are drawn again, and the best draw is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from diffveil.engines import Programs
from diffveil.errors import OptionError
from diffveil.masks import fitted_mask
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.plans import Plan
from diffveil.presets import PRESETS, PSEUDONYM, preset
from fake_programs import FakeBackend, fake_programs

F32 = NDArray[np.float32]
REPEL = replace(
    preset("balanced").anonymize.fitting(has_few=False, has_surrogates=False),
    steps=4,
    accept=None,
    redraws=0,
)
ATTRACT = replace(
    preset("balanced").hide.fitting(has_few=False, has_surrogates=False),
    steps=4,
    accept=None,
    redraws=0,
)
KEYS = [NoiseKey.from_seed(i) for i in range(3)]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return fake_programs(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def judging(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return fake_programs(tmp_path_factory.mktemp("judging"), optional=["assess"])


def crops_of(seed: int, count: int = 3) -> F32:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, 32, 32)).astype(np.float32)


def act(programs: Programs, plan: Plan, crops: F32, keys: list[NoiseKey], variants: int = 1) -> F32:
    operations = FaceOperations(programs)
    verb = operations.anonymize if plan.guidance.mode == "repel" else operations.hide
    return verb(crops, plan, keys=keys, variants=variants)


def placed(programs: Programs, crop: F32, drawn: F32) -> F32:
    """A face put into another's place, [1, 3, S, S]."""
    bundle = programs.bundle
    mask = fitted_mask(bundle.image_size, bundle.template, bundle.template)
    return (crop + mask * (drawn - crop)).astype(np.float32)[None]


def likeness(programs: Programs, crop: F32, drawn: F32) -> float:
    """Cosine of a photo's face and of another put into its place."""
    a = programs.recognize(image=crop[None])
    b = programs.recognize(image=placed(programs, crop, drawn))
    return float((a * b).sum())


def merit(programs: Programs, plan: Plan, crop: F32, drawn: F32) -> tuple[float, float]:
    """How little a face misses what its plan accepts, and how natural it looks: best is largest."""
    missing = 0.0
    if plan.accept is not None:
        sign = 1.0 if plan.guidance.mode == "repel" else -1.0
        missing = max(sign * (likeness(programs, crop, drawn) - plan.accept), 0.0)
    naturalness = 1.0
    if plan.natural and programs.can("assess"):
        naturalness = float(programs.assess(image=placed(programs, crop, drawn))[0])
    return -missing, naturalness


def best_of(
    programs: Programs, plan: Plan, crop: F32, key: NoiseKey, variant: int, first: F32
) -> F32:
    """What a face should become, one draw after the other: the oracle."""
    best, value = first, merit(programs, plan, crop, first)
    for attempt in range(plan.redraws):
        if value[0] == 0.0 and value[1] >= plan.natural:
            break
        again = key.derive("diffveil/v1/redraw", variant, attempt)
        once = replace(plan, accept=None, natural=0.0, redraws=0)
        drawn = act(programs, once, crop[None], [again])[0, 0]
        found = merit(programs, plan, crop, drawn)
        if found > value:
            best, value = drawn, found
    return best


def assert_best_are_kept(
    programs: Programs, once: Plan, asked: Plan, seed: int, variants: int
) -> None:
    """Every face comes out as the oracle, going on from what one draw gives, would have it."""
    crops = crops_of(seed)
    first = act(programs, once, crops, KEYS, variants)
    result = act(programs, asked, crops, KEYS, variants)
    for face in range(len(crops)):
        for variant in range(variants):
            expected = best_of(
                programs, asked, crops[face], KEYS[face], variant, first[face, variant]
            )
            np.testing.assert_allclose(result[face, variant], expected, rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    plan=st.sampled_from([REPEL, ATTRACT]),
    seed=st.integers(0, 1000),
    accept=st.floats(-1, 1),
    redraws=st.integers(0, 4),
    variants=st.integers(1, 3),
)
def test_each_face_is_the_first_that_is_good_enough_or_the_best(
    programs: Programs, plan: Plan, seed: int, accept: float, redraws: int, variants: int
) -> None:
    asked = replace(plan, accept=accept, redraws=redraws)
    assert_best_are_kept(programs, plan, asked, seed, variants)


@settings(max_examples=25, deadline=None)
@given(
    plan=st.sampled_from([REPEL, ATTRACT]),
    seed=st.integers(0, 1000),
    accept=st.none() | st.floats(-1, 1),
    natural=st.floats(0.01, 1),
    redraws=st.integers(1, 4),
    variants=st.integers(1, 3),
)
def test_of_faces_that_are_accepted_the_most_natural_is_kept(
    judging: Programs,
    plan: Plan,
    seed: int,
    accept: float | None,
    natural: float,
    redraws: int,
    variants: int,
) -> None:
    asked = replace(plan, accept=accept, natural=natural, redraws=redraws)
    assert_best_are_kept(judging, plan, asked, seed, variants)


def test_an_unnatural_face_is_drawn_again_and_a_natural_one_is_not(judging: Programs) -> None:
    backend = judging.backend
    assert isinstance(backend, FakeBackend)
    crops = crops_of(3)
    for natural, draws in ((1e-6, 1), (1.0, 4)):
        backend.calls.clear()
        act(judging, replace(REPEL, natural=natural, redraws=3), crops, KEYS)
        names = [name for name, _ in backend.calls]
        assert names.count("decode") == names.count("assess") == draws
        assert "recognize" not in names[names.index("decode") :]  # nobody asked who it is


def test_nature_is_not_asked_for_without_a_judge(programs: Programs) -> None:
    crops = crops_of(4)
    asked = replace(REPEL, natural=1.0, redraws=3)
    np.testing.assert_array_equal(
        act(programs, asked, crops, KEYS), act(programs, REPEL, crops, KEYS)
    )


@pytest.mark.parametrize("plan", [REPEL, ATTRACT], ids=["repel", "attract"])
def test_more_draws_are_never_worse(programs: Programs, plan: Plan) -> None:
    """Asked for what no face reaches, every draw is tried, and the best of them is kept."""
    repel = plan.guidance.mode == "repel"
    crops = crops_of(5)
    found = []
    for redraws in range(6):
        asked = replace(plan, accept=-1.0 if repel else 1.0, redraws=redraws)
        images = act(programs, asked, crops, KEYS)[:, 0]
        found.append([likeness(programs, c, i) for c, i in zip(crops, images, strict=True)])
    steps = np.diff(np.array(found), axis=0) * (1 if repel else -1)
    assert (steps <= 1e-6).all()
    assert (steps < -1e-3).any()  # else this test could not fail


def test_a_face_does_not_depend_on_who_else_is_drawn_again(programs: Programs) -> None:
    crops = crops_of(7)
    plan = replace(REPEL, accept=-1.0, redraws=2)
    together = act(programs, plan, crops, KEYS, 2)
    for face in range(3):
        alone = act(programs, plan, crops[face : face + 1], KEYS[face : face + 1], 2)
        np.testing.assert_allclose(together[face : face + 1], alone, rtol=0, atol=1e-5)


def test_good_faces_cost_one_look(tmp_path: Path) -> None:
    programs = fake_programs(tmp_path)
    backend = programs.backend
    assert isinstance(backend, FakeBackend)
    act(programs, REPEL, crops_of(1), KEYS)
    without = [name for name, _ in backend.calls]
    act(programs, replace(REPEL, accept=1.0, redraws=3), crops_of(1), KEYS)
    assert [name for name, _ in backend.calls[len(without) :]] == [*without, "recognize"]


def test_what_is_known_of_a_face_is_not_asked_again(tmp_path: Path) -> None:
    programs = fake_programs(tmp_path)
    backend = programs.backend
    assert isinstance(backend, FakeBackend)
    act(programs, replace(REPEL, accept=-1.0, redraws=3), crops_of(1), KEYS)
    names = [name for name, _ in backend.calls]
    assert names.count("encode") == names.count("embed") == 1
    assert names.count("recognize") == 5
    assert names.count("decode") == 4


def test_presets_look_at_what_they_drew_and_pseudonyms_do_not() -> None:
    for name in ("fast", "balanced"):
        for plan in (PRESETS[name].anonymize, PRESETS[name].hide):
            while plan is not None:
                assert plan.redraws
                plan = plan.otherwise  # type: ignore[assignment]
        assert 0 < PRESETS[name].anonymize.natural < PRESETS[name].hide.natural < 1
    assert not PRESETS["paper"].anonymize.redraws
    assert not PSEUDONYM.redraws


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"accept": 1.5}, "accept is 1.5"),
        ({"accept": float("nan")}, "accept is nan"),
        ({"redraws": -1, "accept": 0.0}, "redraws is -1"),
        ({"redraws": 17, "accept": 0.0}, "redraws is 17"),
        ({"surrogate": 1.5}, "surrogate is 1.5"),
        ({"surrogate": -0.1}, "surrogate is -0.1"),
        ({"natural": -0.1, "redraws": 1}, "natural is -0.1"),
        ({"natural": 1.5, "redraws": 1}, "natural is 1.5"),
        ({"redraws": 1}, "accept and natural take every face"),
    ],
)
def test_numbers_out_of_range_are_named(changes: dict[str, float], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        replace(REPEL, **{"accept": None, **changes})  # type: ignore[arg-type]
