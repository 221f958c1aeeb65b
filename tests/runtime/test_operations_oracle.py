"""The operations on a real bundle against the published method in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.masks import fitted_mask, latent_mask
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.plans import Guidance, Inversion, Plan
from diffveil.surrogates import Surrogates
from diffveil_export import oracle
from diffveil_export.components import Components
from diffveil_export.oracle import Recipe
from diffveil_export.storage import round_weights
from diffveil_export.surrogates import add_surrogates, mix
from tiny_models import tiny_components

F32 = NDArray[np.float32]

# The random recognizer's gradient is small: these weights make it count.
ANONYMIZE = Recipe(10, 0.6, 300, ((-1, 20.0),), "repel", background_below=300)
HIDE = Recipe(10, 0.8, 600, ((600, 15.0), (-1, 25.0)), "attract")


@pytest.fixture(scope="module")
def operations(tiny_bundle: Bundle) -> FaceOperations:
    return FaceOperations(Programs(tiny_bundle, ONNXRuntimeCPU(threads=1)))


@pytest.fixture(scope="module")
def components() -> Components:
    """The model that the bundle was exported from, its weights rounded as they are stored."""
    model = tiny_components()
    for module in model.modules().values():
        round_weights(module, "int8")
    return model


@pytest.fixture(scope="module")
def exact(components: Components) -> Components:
    """The same model in float64."""
    parts: dict[str, Any] = {
        name: copy.deepcopy(part).double() for name, part in components.modules().items()
    }
    return replace(components, unconditional=components.unconditional.double(), **parts)


def plan_of(recipe: Recipe) -> Plan:
    return Plan(
        sampler="ddim",
        steps=recipe.steps,
        strength=recipe.strength,
        conditional_above=recipe.conditional_above,
        background_below=recipe.background_below,
        guidance=Guidance(weight=recipe.weights, mode=recipe.mode),
        spacing="leading",
        background="clean",
    )


def assert_as_good_as_pytorch(
    ours: F32,
    reference: Callable[[Components, torch.dtype], torch.Tensor],
    models: list[Components],
) -> None:
    """Our error against float64 is of the size of float32 PyTorch's own.

    Both round differently in thousands of sums, so a few times PyTorch's largest error is allowed,
    and never less than what one rounding to float32 can become over the steps.
    """
    single, double = models
    truth = reference(double, torch.float64).numpy()
    theirs = np.abs(reference(single, torch.float32).numpy() - truth).max()
    assert theirs < 1e-3
    assert np.abs(ours - truth).max() <= 5 * theirs + 1e-5


@pytest.mark.parametrize(("faces", "variants"), [(1, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("recipe", [ANONYMIZE, HIDE], ids=["anonymize", "hide"])
def test_protection_is_the_published_method(
    operations: FaceOperations,
    components: Components,
    exact: Components,
    rng: np.random.Generator,
    recipe: Recipe,
    faces: int,
    variants: int,
) -> None:
    crops = rng.uniform(-1, 1, (faces, 3, 32, 32)).astype(np.float32)
    keys = [NoiseKey.from_seed(face) for face in range(faces)]
    noise = operations.start_noise(keys, variants)
    template = operations.bundle.template
    mask = latent_mask(fitted_mask(32, template, template), 4)
    act = operations.anonymize if recipe.mode == "repel" else operations.hide
    ours = act(crops, plan_of(recipe), keys=keys, variants=variants)

    def reference(model: Components, dtype: torch.dtype, recipe: Recipe = recipe) -> torch.Tensor:
        image, start, kept = (torch.from_numpy(a).to(dtype) for a in (crops, noise, mask))
        return oracle.protect(
            model, image, start, recipe, kept if recipe.background_below else None
        )

    assert_as_good_as_pytorch(ours, reference, [components, exact])
    # The comparison would not notice guidance that does nothing.
    unguided = reference(exact, torch.float64, replace(recipe, weights=((-1, 0.0),)))
    assert np.abs(ours - unguided.numpy()).max() > 0.02


@pytest.mark.parametrize(("faces", "variants", "share"), [(1, 1, 1.0), (3, 2, 1.0), (2, 3, 0.4)])
@pytest.mark.parametrize("recipe", [ANONYMIZE, HIDE], ids=["anonymize", "hide"])
def test_surrogates_take_the_place_of_the_empty_prompt(
    tiny_bundle: Bundle,
    components: Components,
    exact: Components,
    rng: np.random.Generator,
    tmp_path: Path,
    recipe: Recipe,
    faces: int,
    variants: int,
    share: float,
) -> None:
    d = tiny_bundle.dimensions
    people = rng.standard_normal((40, d.embedding_width))
    people /= np.linalg.norm(people, axis=1, keepdims=True)
    tokens = rng.standard_normal((40, d.stages, d.token_width)).astype(np.float32)
    mixed = mix(tokens, people.astype(np.float32), 9, people=2)
    bundle = add_surrogates(tiny_bundle, mixed, tmp_path / "b", origin="nobody")
    operations = FaceOperations(Programs(bundle, ONNXRuntimeCPU(threads=1)))
    crops = rng.uniform(-1, 1, (faces, 3, 32, 32)).astype(np.float32)
    keys = [NoiseKey.from_seed(face) for face in range(faces)]
    act = operations.anonymize if recipe.mode == "repel" else operations.hide
    plan = replace(plan_of(recipe), background_below=0, surrogate=share)
    ours = act(crops, plan, keys=keys, variants=variants)

    seen = operations.prepare(crops)
    others = Surrogates.load(bundle).choose(
        seen.tokens, seen.identities, keys, variants=variants, apart=recipe.mode == "repel"
    )
    others = share * others + (1 - share) * seen.tokens[:, None]
    others = others.reshape(-1, *others.shape[2:])
    noise = operations.start_noise(keys, variants)

    def reference(model: Components, dtype: torch.dtype, empty: bool = False) -> torch.Tensor:
        image, start, looks = (torch.from_numpy(a).to(dtype) for a in (crops, noise, others))
        return oracle.protect(model, image, start, recipe, others=None if empty else looks)

    assert_as_good_as_pytorch(ours, reference, [components, exact])
    # Nor would it notice surrogates that are left out.
    assert np.abs(ours - reference(exact, torch.float64, empty=True).numpy()).max() > 1e-3


@pytest.mark.parametrize("faces", [1, 3])
def test_inversion_and_recovery_are_the_published_method(
    operations: FaceOperations,
    components: Components,
    exact: Components,
    rng: np.random.Generator,
    faces: int,
) -> None:
    crops = rng.uniform(-1, 1, (faces, 3, 32, 32)).astype(np.float32)
    inversion = Inversion("ddim", 10)
    tokens, latents = operations.invert(crops, inversion)
    images = operations.recover(tokens, latents, inversion)

    def noise_map(model: Components, dtype: torch.dtype) -> torch.Tensor:
        return oracle.invert(model, torch.from_numpy(crops).to(dtype), 10)[1][:, None]

    def recovered(model: Components, dtype: torch.dtype) -> torch.Tensor:
        key_e, key_i = oracle.invert(model, torch.from_numpy(crops).to(dtype), 10)
        return oracle.recover(model, key_e, key_i, 10)

    assert_as_good_as_pytorch(latents, noise_map, [components, exact])
    assert_as_good_as_pytorch(images, recovered, [components, exact])


def test_exact_recovery_on_a_real_bundle(
    operations: FaceOperations, rng: np.random.Generator
) -> None:
    crops = rng.uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    inversion = Inversion("o-belm", 5)
    images = operations.recover(*operations.invert(crops, inversion), inversion)
    latents = operations.prepare(crops).latents
    round_trip = np.clip(operations.programs.decode(latent=latents), -1, 1)
    np.testing.assert_allclose(images, round_trip, rtol=0, atol=1e-3)


def test_batches_of_a_real_bundle_do_not_matter(
    operations: FaceOperations, rng: np.random.Generator
) -> None:
    crops = rng.uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)
    keys = [NoiseKey.from_seed(face) for face in range(3)]
    plan = plan_of(ANONYMIZE)
    together = operations.anonymize(crops, plan, keys=keys, variants=2)
    bounded = FaceOperations(operations.programs, max_batch=2)
    parts = bounded.anonymize(crops[::-1].copy(), plan, keys=keys[::-1], variants=2)[::-1]
    # Two levels of 255: below what any decision about pixels can see.
    np.testing.assert_allclose(parts, together, rtol=0, atol=2e-3)
