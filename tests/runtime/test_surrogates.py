"""Looks of nobody: how they are chosen, and that faces are drawn with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from diffveil.bundle import SURROGATES_FILE
from diffveil.denoising import Denoiser
from diffveil.engines import Programs
from diffveil.errors import BundleCorruptError, BundleError, OptionError
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.presets import preset
from diffveil.surrogates import Surrogates
from fake_programs import DIMENSIONS, FakeBackend, fake_bundle, fake_programs, surrogate_tensors

F32 = NDArray[np.float32]
D = DIMENSIONS
PLAIN = replace(
    preset("balanced").anonymize.fitting(has_few=False, has_surrogates=False),
    steps=6,
    strength=1.0,
    redraws=0,
)
DRAWN = replace(PLAIN, surrogate=1.0)
KEYS = [NoiseKey.from_seed(i) for i in range(3)]


def unit(array: NDArray[Any]) -> F32:
    length = np.linalg.norm(array, axis=-1, keepdims=True)
    return (array / length).astype(np.float32)


def collection(rng: np.random.Generator, count: int = 12, rank: int = 8) -> Surrogates:
    directions = np.linalg.qr(rng.standard_normal((10 * D.token_width, rank)))[0].T
    arrays = (
        rng.standard_normal((10, D.token_width)),
        directions.reshape(rank, 10, D.token_width),
        rng.standard_normal((count, rank)),
    )
    people = unit(rng.standard_normal((count, D.embedding_width)))
    return Surrogates(*(array.astype(np.float32) for array in arrays), people)


def all_tokens(some: Surrogates) -> F32:
    return some.tokens(np.arange(len(some)))


def test_a_file_gives_what_was_put_into_it(tmp_path: Path) -> None:
    tensors = surrogate_tensors()
    loaded = Surrogates.load(fake_bundle(tmp_path, surrogates=tensors))
    assert len(loaded) == 9
    exact = {name: array.astype(np.float64) for name, array in tensors.items()}
    expected = exact["mean"] + np.einsum("kr,rsd->ksd", exact["coefficients"], exact["basis"])
    np.testing.assert_allclose(all_tokens(loaded), expected, atol=1e-5)
    np.testing.assert_allclose(loaded.identities, tensors["identities"], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(loaded.identities, axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", None),
        ("mean", np.zeros((10, D.token_width), np.float32)),
        ("mean", np.full((10, D.token_width), np.inf, np.float16)),
        ("basis", None),
        ("basis", np.float16(1.0)),
        ("basis", np.zeros((0, 10, D.token_width), np.float16)),
        ("basis", np.zeros((4, 10, D.token_width), np.float16)),
        ("coefficients", np.zeros((8, 5), np.float16)),
        ("coefficients", np.full((9, 5), np.nan, np.float16)),
        ("identities", None),
        ("identities", np.zeros((9, D.embedding_width), np.float16)),
        ("identities", np.ones((9, D.embedding_width + 1), np.float16)),
    ],
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, name: str, value: NDArray[Any] | None
) -> None:
    tensors = surrogate_tensors()
    if value is None:
        del tensors[name]
    else:
        tensors[name] = np.asarray(value)
    bundle = fake_bundle(tmp_path, surrogates=tensors)
    with pytest.raises(BundleError, match="'surrogates"):
        Surrogates.load(bundle)


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    bundle = fake_bundle(tmp_path, surrogates=surrogate_tensors())
    file = tmp_path / SURROGATES_FILE
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(BundleCorruptError, match="SHA-256"):
        Surrogates.load(bundle)
    file.unlink()
    with pytest.raises(BundleCorruptError, match="cannot be read"):
        Surrogates.load(bundle)
    with pytest.raises(BundleError, match="no file 'surrogates"):
        Surrogates.load(fake_bundle(tmp_path / "without"))


def test_bundles_keep_their_fingerprint(tmp_path: Path) -> None:
    with_, without = (
        fake_bundle(tmp_path / "a", surrogates=surrogate_tensors()),
        fake_bundle(tmp_path / "b"),
    )
    assert with_.fingerprint == without.fingerprint
    assert with_.has_surrogates
    assert not without.has_surrogates


@given(seed=st.integers(0, 2**32 - 1), faces=st.integers(1, 4), variants=st.integers(1, 8))
def test_the_chosen_are_near_strangers(seed: int, faces: int, variants: int) -> None:
    rng = np.random.default_rng(seed)
    some = collection(rng)
    tokens = rng.standard_normal((faces, 10, D.token_width)).astype(np.float32)
    people = unit(rng.standard_normal((faces, D.embedding_width)))
    keys = [NoiseKey.from_seed(i) for i in range(faces)]
    chosen = some.choose(tokens, people, keys, variants=variants)
    assert chosen.shape == (faces, variants, 10, D.token_width)
    every = all_tokens(some)
    # The oracle: all strangers by the cosine of what directions hold of tokens less their mean, and
    # half that of embeddings.
    basis = some.basis.astype(np.float64).reshape(len(some.basis), -1)

    def look(token: F32) -> NDArray[np.float64]:
        held = basis @ (token.astype(np.float64) - some.mean).ravel()
        return held / np.linalg.norm(held)

    for face in range(faces):
        likeness = some.identities @ people[face]
        strangers = [k for k in range(len(some)) if likeness[k] <= 0.3]
        near = [
            float(look(tokens[face]) @ look(token) + like / 2)
            for token, like in zip(every, likeness, strict=True)
        ]
        allowed = sorted(strangers, key=lambda k: -near[k])[:6] or [int(np.argmin(likeness))]
        drawn = [int(np.argmin(np.abs(every - row).max(axis=(1, 2)))) for row in chosen[face]]
        assert set(drawn) <= set(allowed)
        assert len(set(drawn)) == min(variants, len(allowed))
        cosines = some.identities.astype(np.float64) @ some.identities.T
        for v in range(1, min(variants, len(allowed))):
            # Each is the one least like any that was chosen before.
            alike = {k: max(cosines[k, before] for before in drawn[:v]) for k in allowed}
            assert alike[drawn[v]] <= min(alike.values()) + 1e-5


def test_hidden_faces_may_look_like_their_person(rng: np.random.Generator) -> None:
    some = collection(rng)
    own = some.identities[:1]
    near = all_tokens(some)[:1]
    hidden = some.choose(near, own, KEYS[:1], variants=6, apart=False)[0]
    anonymous = some.choose(near, own, KEYS[:1], variants=6, apart=True)[0]
    assert any(np.allclose(row, near[0], atol=1e-5) for row in hidden)
    assert not any(np.allclose(row, near[0], atol=1e-5) for row in anonymous)


def test_the_choice_is_the_faces_own(rng: np.random.Generator) -> None:
    some = collection(rng)
    tokens = rng.standard_normal((3, 10, D.token_width)).astype(np.float32)
    people = unit(rng.standard_normal((3, D.embedding_width)))
    whole = some.choose(tokens, people, KEYS, variants=4)
    for i in range(3):
        alone = some.choose(tokens[i : i + 1], people[i : i + 1], KEYS[i : i + 1], variants=2)
        np.testing.assert_allclose(alone[0], whole[i, :2], atol=1e-5)
    other = [NoiseKey.from_seed(100 + i) for i in range(3)]
    assert not np.array_equal(whole, some.choose(tokens, people, other, variants=4))


def conditionings(programs: Programs) -> list[F32]:
    assert isinstance(programs.backend, FakeBackend)
    return [inputs["conditioning"] for inputs in programs.backend.inputs("denoise")]


def test_faces_are_drawn_with_them_where_their_own_does_not_hold(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    crops = rng.uniform(-1, 1, (2, 3, D.image_size, D.image_size)).astype(np.float32)
    programs = fake_programs(tmp_path / "a", surrogates=surrogate_tensors())
    operations = FaceOperations(programs)
    operations.anonymize(crops, DRAWN, keys=KEYS[:2], variants=3)
    seen = conditionings(programs)
    faces, some = operations.prepare(crops), Surrogates.load(programs.bundle)
    chosen = some.choose(faces.tokens, faces.identities, KEYS[:2], variants=3).reshape(6, 10, -1)
    timesteps = DRAWN.table(operations.schedule).timesteps
    assert any(t > DRAWN.conditional_above for t in timesteps)
    assert any(t <= DRAWN.conditional_above for t in timesteps)
    for given_, t in zip(seen, timesteps, strict=True):
        own = t > DRAWN.conditional_above
        tokens = np.repeat(faces.tokens, 3, axis=0) if own else chosen
        expected = programs.expand(tokens=np.ascontiguousarray(tokens[:, t // 100]))
        np.testing.assert_allclose(given_, expected, rtol=1e-6)


def test_a_face_does_not_depend_on_its_batch(tmp_path: Path, rng: np.random.Generator) -> None:
    crops = rng.uniform(-1, 1, (3, 3, D.image_size, D.image_size)).astype(np.float32)
    programs = fake_programs(tmp_path, surrogates=surrogate_tensors())
    operations = FaceOperations(programs, max_batch=4)
    whole = operations.anonymize(crops, DRAWN, keys=KEYS, variants=2)
    for i in range(3):
        alone = operations.anonymize(crops[i : i + 1], DRAWN, keys=KEYS[i : i + 1], variants=2)
        np.testing.assert_allclose(alone[0], whole[i], atol=1e-5)


def test_bundles_without_them_follow_the_plan_for_those(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    crops = rng.uniform(-1, 1, (2, 3, D.image_size, D.image_size)).astype(np.float32)
    operations = FaceOperations(fake_programs(tmp_path))
    stronger = replace(PLAIN, guidance=replace(PLAIN.guidance, weight=((-1, 0.7),)))
    result = operations.anonymize(crops, replace(DRAWN, otherwise=stronger), keys=KEYS[:2])
    expected = operations.anonymize(crops, stronger, keys=KEYS[:2])
    np.testing.assert_array_equal(result, expected)


def test_the_photos_own_noise_does_not_go_with_them() -> None:
    with pytest.raises(OptionError, match="keeps what a surrogate is to replace"):
        replace(DRAWN, fresh_noise=0.5)


def test_the_denoiser_expands_only_what_it_is_asked_for(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    programs = fake_programs(tmp_path)
    tokens = rng.standard_normal((2, 10, D.token_width)).astype(np.float32)
    others = rng.standard_normal((4, 10, D.token_width)).astype(np.float32)
    denoise = Denoiser(programs, tokens, [950, 850, 150], conditional_above=800, surrogates=others)
    assert isinstance(programs.backend, FakeBackend)
    assert [len(i["tokens"]) for i in programs.backend.inputs("expand")] == [4, 4]
    two = denoise.varied(2)
    assert two.conditioning(850, 4).shape == (4, 3, 5)
    np.testing.assert_allclose(
        two.conditioning(150, 4), programs.expand(tokens=np.ascontiguousarray(others[:, 1]))
    )
