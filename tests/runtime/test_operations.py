from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from diffveil.engines import Programs
from diffveil.errors import OptionError
from diffveil.masks import fitted_mask, latent_mask
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.plans import Inversion, Plan
from diffveil.presets import preset
from fake_programs import FakeBackend, fake_programs

F32 = NDArray[np.float32]
_PLAIN = replace(
    preset("balanced").anonymize.fitting(has_few=False, has_surrogates=False), redraws=0
)
ANONYMIZE = replace(
    _PLAIN,
    sampler="ddim",
    steps=5,
    strength=0.6,
    guidance=replace(_PLAIN.guidance, through="pixels"),
)
HIDE = replace(
    preset("balanced").hide.fitting(has_few=False, has_surrogates=False),
    steps=5,
    strength=0.8,
    redraws=0,
)


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return fake_programs(tmp_path)


@pytest.fixture
def backend(programs: Programs) -> FakeBackend:
    assert isinstance(programs.backend, FakeBackend)
    return programs.backend


@pytest.fixture
def operations(programs: Programs) -> FaceOperations:
    return FaceOperations(programs)


@pytest.fixture
def crops(rng: np.random.Generator) -> F32:
    return rng.uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)


def noise_keys(count: int) -> list[NoiseKey]:
    return [NoiseKey.from_seed(1).derive("test", index) for index in range(count)]


def test_shapes_and_range(operations: FaceOperations, crops: F32) -> None:
    images = operations.anonymize(crops, ANONYMIZE, keys=noise_keys(3), variants=2)
    assert images.shape == (3, 2, 3, 32, 32)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1.0
    assert operations.hide(crops, HIDE, keys=noise_keys(3)).shape == (3, 1, 3, 32, 32)


@pytest.mark.parametrize("variants", [1, 2])
def test_a_face_does_not_depend_on_its_batch(
    operations: FaceOperations, crops: F32, variants: int
) -> None:
    keys = noise_keys(3)
    together = operations.anonymize(crops, ANONYMIZE, keys=keys, variants=variants)
    order = [2, 0, 1]
    shuffled = operations.anonymize(
        crops[order], ANONYMIZE, keys=[keys[i] for i in order], variants=variants
    )
    np.testing.assert_allclose(shuffled, together[order], rtol=0, atol=1e-4)
    for i in range(3):
        alone = operations.anonymize(
            crops[i : i + 1], ANONYMIZE, keys=keys[i : i + 1], variants=variants
        )
        np.testing.assert_allclose(alone[0], together[i], rtol=0, atol=1e-4)


def test_batches_are_bounded(programs: Programs, backend: FakeBackend, crops: F32) -> None:
    whole = FaceOperations(programs).anonymize(crops, ANONYMIZE, keys=noise_keys(3), variants=3)
    backend.calls.clear()
    bounded = FaceOperations(programs, max_batch=4)
    parts = bounded.anonymize(crops, ANONYMIZE, keys=noise_keys(3), variants=3)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-4)
    assert max(len(next(iter(inputs.values()))) for _, inputs in backend.calls) <= 4
    assert {len(call["x0"]) for call in backend.inputs("guide")} == {3}


def test_noise_is_a_function_of_key_and_variant(operations: FaceOperations) -> None:
    keys = noise_keys(2)
    noise = operations.start_noise(keys, 3)
    assert noise.shape == (2, 3, 8, 4, 4)
    assert len(np.unique(noise.reshape(6, -1)[:, 0])) == 6
    np.testing.assert_array_equal(operations.start_noise(keys[1:], 2)[0], noise[1, :2])


def test_variants_differ_and_keys_matter(operations: FaceOperations, crops: F32) -> None:
    images = operations.anonymize(crops[:1], ANONYMIZE, keys=noise_keys(1), variants=4)[0]
    for i in range(4):
        for j in range(i):
            assert np.abs(images[i] - images[j]).max() > 0.05
    again = operations.anonymize(crops[:1], ANONYMIZE, keys=noise_keys(1), variants=4)[0]
    np.testing.assert_array_equal(again, images)
    other = operations.anonymize(crops[:1], ANONYMIZE, keys=noise_keys(2)[1:], variants=4)[0]
    assert np.abs(other - images).max() > 0.05


def test_guidance_moves_identity_the_right_way(operations: FaceOperations, crops: F32) -> None:
    def similarity(images: F32) -> NDArray[np.float32]:
        flat = images.reshape(-1, 3, 32, 32)
        return np.asarray(np.sum(operations.embed(flat) * operations.embed(crops), axis=1))

    def weighted(plan: Plan, weight: float) -> Plan:
        margin = -0.8 if plan.guidance.mode == "repel" else None
        guidance = replace(plan.guidance, weight=((-1, weight),), margin=margin)
        return replace(plan, guidance=guidance)

    keys = noise_keys(3)
    repelled = operations.anonymize(crops, weighted(ANONYMIZE, 0.5), keys=keys)
    unguided = operations.anonymize(crops, weighted(ANONYMIZE, 0.0), keys=keys)
    attracted = operations.hide(crops, weighted(HIDE, 0.5), keys=keys)
    unguided_hidden = operations.hide(crops, weighted(HIDE, 0.0), keys=keys)
    assert similarity(repelled).mean() < similarity(unguided).mean() - 0.2
    assert similarity(attracted).mean() > similarity(unguided_hidden).mean() + 0.2


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_o_belm_recovery_returns_the_encoded_latent(
    operations: FaceOperations, crops: F32, steps: int
) -> None:
    inversion = Inversion("o-belm", steps)
    tokens, latents = operations.invert(crops, inversion)
    assert latents.shape == (3, 2, 8, 4, 4)
    recovered = operations.recover(tokens, latents, inversion)
    batch = operations.prepare(crops)
    round_trip = np.clip(operations.programs.decode(latent=batch.latents), -1, 1)
    # One rounding to float32 a step, of latents that grow to a few units.
    np.testing.assert_allclose(recovered, round_trip, rtol=0, atol=1e-4)


def test_ddim_recovery_approximates_the_encoded_latent(
    operations: FaceOperations, crops: F32
) -> None:
    def error(steps: int) -> float:
        inversion = Inversion("ddim", steps)
        tokens, latents = operations.invert(crops, inversion)
        assert latents.shape == (3, 1, 8, 4, 4)
        images = operations.recover(tokens, latents, inversion)
        round_trip = operations.programs.decode(latent=operations.prepare(crops).latents)
        return float(np.abs(images - np.clip(round_trip, -1, 1)).mean())

    assert 1e-4 < error(100) < error(10)


def test_recovery_does_not_depend_on_the_batch(operations: FaceOperations, crops: F32) -> None:
    inversion = Inversion("o-belm", 4)
    tokens, latents = operations.invert(crops, inversion)
    alone_tokens, alone_latents = operations.invert(crops[1:2], inversion)
    np.testing.assert_allclose(alone_tokens[0], tokens[1], rtol=1e-5)
    np.testing.assert_allclose(alone_latents[0], latents[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("background", ["clean", "noised"])
def test_the_background_stays_the_photos(
    programs: Programs, backend: FakeBackend, crops: F32, background: Literal["clean", "noised"]
) -> None:
    operations = FaceOperations(programs)
    plan = replace(ANONYMIZE, background_below=300, background=background)
    operations.anonymize(crops, plan, keys=noise_keys(3))
    template = programs.bundle.template
    outside = latent_mask(fitted_mask(32, template, template), 4) == 0
    assert outside.any()
    clean = operations.prepare(crops).latents
    final = backend.inputs("decode")[-1]["latent"]
    # The clean end of the schedule keeps a little noise, and so does a noised background.
    tolerance = 1e-6 if background == "clean" else 6.8 * operations.schedule.noise(-1)
    change = np.abs(final - clean).max(axis=(0, 1))
    assert change[outside].max() <= tolerance
    assert change[~outside].max() > 0.3


def test_each_crop_has_its_landmarks(programs: Programs, crops: F32) -> None:
    points = np.tile(programs.bundle.template, (len(crops), 1, 1))
    operations = FaceOperations(programs)
    as_the_template = operations.prepare(crops, points).pixel_masks
    np.testing.assert_array_equal(as_the_template, operations.prepare(crops).pixel_masks)
    for wrong in (points[:-1], points[:, :4], points[0], points * np.nan):
        with pytest.raises(OptionError, match="landmarks"):
            operations.prepare(crops, wrong)


def test_without_a_background_limit_nothing_is_kept(
    programs: Programs, backend: FakeBackend, crops: F32
) -> None:
    operations = FaceOperations(programs)
    operations.anonymize(crops, replace(ANONYMIZE, background_below=0), keys=noise_keys(3))
    change = np.abs(backend.inputs("decode")[-1]["latent"] - operations.prepare(crops).latents)
    assert change.max(axis=(0, 1)).min() > 0.3


def test_without_fresh_noise_and_guidance_the_photo_comes_back(
    operations: FaceOperations, crops: F32
) -> None:
    expected = operations.programs.decode(latent=operations.programs.encode(image=crops))
    unguided = replace(ANONYMIZE.guidance, weight=((-1, 0.0),))
    errors = {}
    for fresh in (0.0, 1.0):
        plan = replace(
            ANONYMIZE, steps=60, guidance=unguided, fresh_noise=fresh, background_below=0
        )
        images = operations.anonymize(crops, plan, keys=noise_keys(3))[:, 0]
        errors[fresh] = float(np.abs(images - np.clip(expected, -1, 1)).mean())
    assert errors[0.0] < 0.1 * errors[1.0]


def test_own_noise_knows_no_key_and_fresh_noise_does(
    operations: FaceOperations, crops: F32
) -> None:
    for fresh, alike in ((0.0, True), (0.5, False)):
        plan = replace(ANONYMIZE, fresh_noise=fresh)
        first = operations.anonymize(crops, plan, keys=noise_keys(4)[:3])
        second = operations.anonymize(crops, plan, keys=noise_keys(4)[1:])
        assert np.array_equal(first, second) is alike


def test_operations_on_one_batch_ask_once(
    programs: Programs, backend: FakeBackend, crops: F32
) -> None:
    operations = FaceOperations(programs)
    faces = operations.prepare(crops)
    operations.anonymize(faces, ANONYMIZE, keys=noise_keys(3))
    operations.invert(faces, Inversion("o-belm", 2))
    operations.embed(faces)
    for program in ("encode", "embed", "recognize"):
        assert len(backend.inputs(program)) == 1


def test_nobody_is_recognised_for_a_plan_without_guidance(
    programs: Programs, backend: FakeBackend, crops: F32
) -> None:
    unguided = replace(ANONYMIZE.guidance, weight=((-1, 0.0),))
    plan = replace(ANONYMIZE, guidance=unguided)
    FaceOperations(programs).anonymize(crops, plan, keys=noise_keys(3))
    assert not backend.inputs("recognize")
    assert not backend.inputs("guide")


def test_progress_counts_the_steps(operations: FaceOperations, crops: F32) -> None:
    seen: list[tuple[int, int]] = []
    operations.anonymize(
        crops, ANONYMIZE, keys=noise_keys(3), progress=lambda *state: seen.append(state)
    )
    assert seen == [(i, 3) for i in (1, 2, 3)]


def test_swapped_plans_are_refused(operations: FaceOperations, crops: F32) -> None:
    with pytest.raises(OptionError, match="guidance is 'attract', expected 'repel'"):
        operations.anonymize(crops, HIDE, keys=noise_keys(3))
    with pytest.raises(OptionError, match="guidance is 'repel', expected 'attract'"):
        operations.hide(crops, ANONYMIZE, keys=noise_keys(3))


def test_every_problem_of_a_call_is_named(operations: FaceOperations, crops: F32) -> None:
    with pytest.raises(OptionError, match=r"2 noise keys for 3 faces.*variants is 0"):
        operations.anonymize(crops, ANONYMIZE, keys=noise_keys(2), variants=0)
    with pytest.raises(OptionError, match="variants is 33, expected 1 to 32"):
        operations.anonymize(crops, ANONYMIZE, keys=noise_keys(3), variants=33)


@pytest.mark.parametrize(
    "crops",
    [
        np.zeros((0, 3, 32, 32), np.float32),
        np.zeros((1, 3, 32, 31), np.float32),
        np.zeros((3, 32, 32), np.float32),
        np.zeros((1, 3, 32, 32), np.float64),
        np.zeros((1, 32, 32, 3), np.uint8),
    ],
)
def test_what_is_no_batch_of_crops_is_refused(
    operations: FaceOperations, crops: NDArray[np.generic]
) -> None:
    with pytest.raises(OptionError, match=r"expected float32 \[N, 3, 32, 32\]"):
        operations.embed(crops)  # type: ignore[arg-type]


def test_a_noise_map_of_another_shape_is_refused(operations: FaceOperations, crops: F32) -> None:
    inversion = Inversion("o-belm", 2)
    tokens, latents = operations.invert(crops, inversion)
    for wrong_tokens, wrong_latents in (
        (tokens, latents[:, :1]),
        (tokens[:2], latents),
        (tokens[:, :9], latents),
        (tokens[..., :5], latents),
        (tokens[:0], latents[:0]),
    ):
        with pytest.raises(OptionError, match="recover: "):
            operations.recover(wrong_tokens, wrong_latents, inversion)


def test_batch_limits_are_checked(programs: Programs) -> None:
    with pytest.raises(OptionError, match="max_batch is 0"):
        FaceOperations(programs, max_batch=0)


@pytest.mark.parametrize("sampler", ["dpm++2m", "lcm", "tcd"])
@pytest.mark.parametrize("spacing", ["trailing", "karras", "ays"])
def test_every_sampler_is_a_function_of_key_and_step(
    operations: FaceOperations, crops: F32, sampler: Any, spacing: Any
) -> None:
    """Noise of stochastic steps depends on neither batch nor order nor what ran before."""
    plan = replace(ANONYMIZE, sampler=sampler, spacing=spacing, fresh_noise=1.0)
    keys = noise_keys(3)
    together = operations.anonymize(crops, plan, keys=keys, variants=2)
    again = operations.anonymize(crops[[2, 0]], plan, keys=[keys[2], keys[0]], variants=2)
    np.testing.assert_allclose(again, together[[2, 0]], rtol=0, atol=1e-4)
    other = operations.anonymize(crops[:1], plan, keys=noise_keys(4)[3:], variants=2)
    assert np.abs(other - together[:1]).max() > 1e-3


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_bdia_keys_bring_the_latent_back(
    operations: FaceOperations, programs: Programs, crops: F32, steps: int
) -> None:
    faces = operations.prepare(crops)
    inversion = Inversion("bdia", steps)
    tokens, latents = operations.invert(faces, inversion)
    assert latents.shape[1] == 2
    back = operations.recover(tokens, latents, inversion)
    trip = np.clip(programs.decode(latent=faces.latents), -1, 1)
    np.testing.assert_allclose(back, trip, rtol=0, atol=1e-4)
