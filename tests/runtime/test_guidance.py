from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from diffveil.engines import Programs
from diffveil.errors import OptionError
from diffveil.guidance import IdentityGuidance
from diffveil.plans import Guidance
from diffveil.samplers import ddim
from diffveil.schedule import NoiseSchedule
from fake_programs import FakeBackend, fake_programs

STEP = ddim(NoiseSchedule(), 10).steps[0]
PAPER = Guidance(weight=((-1, 1.0),))
F32 = NDArray[np.float32]
Array = NDArray[Any]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return fake_programs(tmp_path)


@pytest.fixture
def backend(programs: Programs) -> FakeBackend:
    assert isinstance(programs.backend, FakeBackend)
    return programs.backend


@pytest.fixture
def identities(rng: np.random.Generator) -> F32:
    vectors = rng.standard_normal((3, 7))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


@pytest.fixture
def x0(rng: np.random.Generator) -> F32:
    return rng.standard_normal((6, 8, 4, 4)).astype(np.float32)


def scripted(embedding: F32, gradient: F32) -> dict[str, Array]:
    return {"gradient": gradient, "energy": np.zeros(len(gradient)), "embedding": embedding}


def turned(identity: F32, cosine: float) -> F32:
    """A unit vector at this cosine to a unit vector."""
    other = np.roll(identity, 1) - np.dot(np.roll(identity, 1), identity) * identity
    other /= np.linalg.norm(other)
    return np.asarray(cosine * identity + np.sqrt(1 - cosine**2) * other, dtype=np.float32)


@pytest.mark.parametrize(
    ("mode", "margin", "repel", "attract", "sign"),
    [
        ("repel", None, 1.0, 0.0, 1.0),
        ("repel", 0.1, 1.0, 0.0, 1.0),
        ("repel", 0.0, 1.0, 0.0, 1.0),
        ("repel", -0.2, 0.0, 1.0, -1.0),
        ("attract", None, 0.0, 1.0, 1.0),
        ("attract", 0.9, 0.0, 1.0, 1.0),
    ],
)
def test_what_the_program_is_asked(
    programs: Programs,
    backend: FakeBackend,
    identities: F32,
    x0: F32,
    mode: Literal["repel", "attract"],
    margin: float | None,
    repel: float,
    attract: float,
    sign: float,
) -> None:
    guidance = replace(PAPER, mode=mode, margin=margin)
    IdentityGuidance(programs, guidance, identities, variants=2)(x0, STEP)
    (call,) = backend.inputs("guide")
    np.testing.assert_array_equal(call["anchor"], sign * identities.repeat(2, axis=0))
    np.testing.assert_array_equal(call["repel"], np.full(6, repel))
    np.testing.assert_array_equal(call["attract"], np.full(6, attract))
    np.testing.assert_array_equal(call["x0"], x0)


def test_variants_repel_each_other_within_a_face_only(
    programs: Programs, backend: FakeBackend, identities: F32, x0: F32
) -> None:
    IdentityGuidance(programs, PAPER, identities[:2], variants=3)(x0, STEP)
    expected = np.zeros((6, 6))
    for i, j in ((0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)):
        expected[i, j] = 1.0
    np.testing.assert_array_equal(backend.inputs("guide")[0]["sibling"], expected)


def test_hidden_variants_do_not_repel_each_other(
    programs: Programs, backend: FakeBackend, identities: F32, x0: F32
) -> None:
    guidance = replace(PAPER, mode="attract")
    IdentityGuidance(programs, guidance, identities[:2], variants=3)(x0, STEP)
    assert not backend.inputs("guide")[0]["sibling"].any()


def test_a_face_is_never_split_between_calls_and_calls_do_not_matter(
    programs: Programs, backend: FakeBackend, identities: F32, x0: F32
) -> None:
    whole = IdentityGuidance(programs, PAPER, identities, variants=2)(x0, STEP)
    backend.calls.clear()
    parts = IdentityGuidance(programs, PAPER, identities, variants=2, max_batch=3)(x0, STEP)
    assert [len(call["x0"]) for call in backend.inputs("guide")] == [2, 2, 2]
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_plain_gradients_are_passed_on(
    programs: Programs, backend: FakeBackend, identities: F32, x0: F32
) -> None:
    gradient = np.linspace(-3, 3, x0.size, dtype=np.float32).reshape(x0.shape)
    backend.overrides["guide"] = lambda **_: scripted(identities.repeat(2, axis=0), gradient)
    found = IdentityGuidance(programs, PAPER, identities, variants=2)(x0, STEP)
    np.testing.assert_array_equal(found, gradient)


def test_rms_gives_every_face_a_gradient_of_unit_size_and_leaves_zero_alone(
    programs: Programs, backend: FakeBackend, identities: F32, x0: F32, rng: np.random.Generator
) -> None:
    gradient = (
        rng.standard_normal(x0.shape)
        * np.array([1e-6, 1.0, 1e6, 0.0, 3.0, 1e-20])[:, None, None, None]
    )
    backend.overrides["guide"] = lambda **_: scripted(
        identities.repeat(2, axis=0), gradient.astype(np.float32)
    )
    guidance = replace(PAPER, normalise="rms")
    found = IdentityGuidance(programs, guidance, identities, variants=2)(x0, STEP)
    rms = np.sqrt(np.square(found, dtype=np.float64).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(rms, [1, 1, 1, 0, 1, 0], rtol=1e-5)
    cosine = (found[0] * gradient[0]).sum() / np.linalg.norm(found[0]) / np.linalg.norm(gradient[0])
    assert cosine == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "margin", "cosines", "guided"),
    [
        ("repel", -0.2, (-0.3, -0.1, 0.5), (False, True, True)),
        ("repel", 0.1, (-0.3, 0.05, 0.2), (False, False, True)),
        ("attract", 0.6, (0.7, 0.5, -0.5), (False, True, True)),
        ("repel", None, (-0.9, 0.0, 0.9), (True, True, True)),
        ("attract", None, (-0.9, 0.0, 0.9), (True, True, True)),
    ],
)
def test_faces_beyond_the_margin_are_left_alone(
    programs: Programs,
    backend: FakeBackend,
    identities: F32,
    x0: F32,
    mode: Literal["repel", "attract"],
    margin: float | None,
    cosines: tuple[float, ...],
    guided: tuple[bool, ...],
) -> None:
    embedding = np.stack([turned(i, c) for i, c in zip(identities, cosines, strict=True)])
    gradient = np.ones_like(x0[:3])
    backend.overrides["guide"] = lambda **_: scripted(embedding, gradient)
    guidance = replace(PAPER, mode=mode, margin=margin)
    found = IdentityGuidance(programs, guidance, identities)(x0[:3], STEP)
    assert np.any(found, axis=(1, 2, 3)).tolist() == list(guided)


def test_a_variant_that_resembles_another_is_not_left_alone(
    programs: Programs, backend: FakeBackend, x0: F32
) -> None:
    # One face, three variants beyond the margin: the first two alike, the third opposed to both.
    identity = np.eye(7, dtype=np.float32)[:1]
    away, side = -0.1, np.sqrt(1 - 0.1**2)
    embedding = np.zeros((3, 7), dtype=np.float32)
    embedding[:, 0] = away
    embedding[:, 1] = (side, side, -side)
    backend.overrides["guide"] = lambda **_: scripted(embedding, np.ones_like(x0[:3]))
    guidance = replace(PAPER, margin=-0.05)
    found = IdentityGuidance(programs, guidance, identity, variants=3)(x0[:3], STEP)
    assert found.any(axis=(1, 2, 3)).tolist() == [True, True, False]


LATENT = replace(PAPER, through="latent")


def test_the_cheap_program_is_asked_where_the_bundle_has_it(
    tmp_path: Path, identities: F32, x0: F32
) -> None:
    programs = fake_programs(tmp_path, optional=["guide_latent"])
    backend = programs.backend
    assert isinstance(backend, FakeBackend)
    cheap = IdentityGuidance(programs, LATENT, identities, variants=2)(x0, STEP)
    assert [name for name, _ in backend.calls] == ["guide_latent"]
    backend.calls.clear()
    full = IdentityGuidance(programs, PAPER, identities, variants=2)(x0, STEP)
    assert [name for name, _ in backend.calls] == ["guide"]
    np.testing.assert_array_equal(cheap, full)


def test_without_it_the_full_gradient_protects(
    programs: Programs, backend: FakeBackend, identities: F32, x0: F32
) -> None:
    IdentityGuidance(programs, LATENT, identities, variants=2)(x0, STEP)
    assert [name for name, _ in backend.calls] == ["guide"]


def test_repeats_are_gradients_along_the_way(programs: Programs, identities: F32, x0: F32) -> None:
    """Two repeats equal a first gradient, and a second where the loop will have gone by then."""
    guided = replace(STEP, g=0.3)
    once = IdentityGuidance(programs, PAPER, identities, variants=2)
    first = once(x0, guided)
    reach = np.float32(0.3 / NoiseSchedule().signal(guided.next_timestep))
    second = once(x0 - reach * first, guided)
    twice = IdentityGuidance(programs, replace(PAPER, repeats=2), identities, variants=2)
    np.testing.assert_allclose(twice(x0, guided), first + second, rtol=1e-5, atol=1e-6)


def test_variants_are_asked_more_often_and_single_faces_are_not(
    programs: Programs, backend: FakeBackend, identities: F32, x0: F32
) -> None:
    guided = replace(STEP, g=0.3)
    asked = replace(PAPER, sibling_repeats=2)
    alone = IdentityGuidance(programs, asked, identities)(x0[:3], guided)
    assert len(backend.inputs("guide")) == 1
    np.testing.assert_array_equal(
        alone, IdentityGuidance(programs, PAPER, identities)(x0[:3], guided)
    )
    together = IdentityGuidance(programs, asked, identities, variants=2)
    twice = IdentityGuidance(programs, replace(PAPER, repeats=2), identities, variants=2)
    assert together.repeats == twice.repeats == 2
    np.testing.assert_array_equal(together(x0, guided), twice(x0, guided))
    # Who attracts has no siblings that repel.
    towards = replace(asked, mode="attract")
    assert IdentityGuidance(programs, towards, identities, variants=2).repeats == 1
    with pytest.raises(OptionError, match="sibling_repeats is 0"):
        replace(PAPER, sibling_repeats=0)


def test_faces_that_are_safe_are_not_asked_again(
    programs: Programs, backend: FakeBackend, identities: F32, x0: F32
) -> None:
    cosines = [0.5, -0.3, 0.5]
    embedding = np.stack([turned(i, c) for i, c in zip(identities, cosines, strict=True)])
    rows = {x.tobytes(): e for x, e in zip(x0[:3], embedding, strict=True)}

    def answer(x0: F32, **_: Any) -> dict[str, Array]:
        # A gradient of zero keeps every face where it is, so that its rows can be told apart.
        return scripted(np.stack([rows[x.tobytes()] for x in x0]), np.zeros_like(x0))

    backend.overrides["guide"] = answer
    guidance = replace(PAPER, margin=-0.2, repeats=3)
    IdentityGuidance(programs, guidance, identities)(x0[:3], STEP)
    assert [len(call["x0"]) for call in backend.inputs("guide")] == [3, 2, 2]


def test_when_all_are_safe_nobody_is_asked_again(
    programs: Programs, backend: FakeBackend, identities: F32, x0: F32
) -> None:
    embedding = np.stack([turned(i, -0.5) for i in identities])
    backend.overrides["guide"] = lambda **_: scripted(embedding, np.ones_like(x0[:3]))
    guidance = replace(PAPER, margin=-0.2, repeats=9)
    found = IdentityGuidance(programs, guidance, identities)(x0[:3], STEP)
    assert len(backend.inputs("guide")) == 1
    assert not found.any()


def test_a_gradient_is_used_again_between_questions(
    programs: Programs, backend: FakeBackend, identities: F32, x0: F32
) -> None:
    guidance = replace(PAPER, every=3, reuse=True)
    guide = IdentityGuidance(programs, guidance, identities, variants=2)
    found = [guide(x0 * (1 + index), STEP) for index in range(5)]
    assert len(backend.inputs("guide")) == 2
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])
    np.testing.assert_array_equal(found[4], found[3])
    assert np.any(found[3] != found[0])


def test_reuse_weighs_every_step_and_skipping_only_some() -> None:
    skipping = replace(PAPER, every=2)
    assert [skipping.weight_at(i, 500, 1.0) for i in range(4)] == [1.0, 0.0, 1.0, 0.0]
    assert [replace(skipping, reuse=True).weight_at(i, 500, 1.0) for i in range(4)] == [1.0] * 4
