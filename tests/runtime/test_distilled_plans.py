"""Plans for `denoise_few`, on bundles with and without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from diffveil.engines import Programs
from diffveil.errors import OptionError
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.plans import Plan
from diffveil.presets import PRESETS, preset
from fake_programs import FakeBackend, fake_programs

F32 = NDArray[np.float32]
PLAIN = replace(
    preset("balanced").anonymize.fitting(has_few=False, has_surrogates=False),
    steps=6,
    redraws=0,
)
FEW = replace(PLAIN, sampler="lcm", steps=3, distilled=True)
KEYS = [NoiseKey.from_seed(i) for i in range(2)]


@pytest.fixture
def crops(rng: np.random.Generator) -> F32:
    return rng.uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)


def calls(programs: Programs) -> list[str]:
    assert isinstance(programs.backend, FakeBackend)
    return [name for name, _ in programs.backend.calls if name.startswith("denoise")]


def test_the_distilled_model_is_asked_at_every_step(tmp_path: Path, crops: F32) -> None:
    programs = fake_programs(tmp_path, optional=["denoise_few"])
    few = FaceOperations(programs).anonymize(crops, FEW, keys=KEYS)
    assert calls(programs) == ["denoise_few"] * 2
    plain = FaceOperations(programs).anonymize(crops, replace(FEW, distilled=False), keys=KEYS)
    assert calls(programs)[2:] == ["denoise"] * 2
    assert np.abs(few - plain).max() > 1e-3


def test_the_photos_own_noise_is_found_by_the_model_itself(tmp_path: Path, crops: F32) -> None:
    programs = fake_programs(tmp_path, optional=["denoise_few"])
    FaceOperations(programs).anonymize(crops, replace(FEW, fresh_noise=0.5), keys=KEYS)
    assert calls(programs) == ["denoise"] * 2 + ["denoise_few"] * 2


@pytest.mark.parametrize("otherwise", [None, PLAIN])
def test_bundles_without_it_are_sampled_otherwise(
    tmp_path: Path, crops: F32, otherwise: Plan | None
) -> None:
    programs = fake_programs(tmp_path)
    operations = FaceOperations(programs)
    result = operations.anonymize(crops, replace(FEW, otherwise=otherwise), keys=KEYS)
    expected = otherwise or replace(FEW, distilled=False)
    np.testing.assert_array_equal(result, operations.anonymize(crops, expected, keys=KEYS))
    assert set(calls(programs)) == {"denoise"}


def test_what_takes_a_plans_place_must_do_the_same() -> None:
    with pytest.raises(OptionError, match="the plan asks for nothing"):
        replace(PLAIN, otherwise=PLAIN)
    with pytest.raises(OptionError, match="guides the other way"):
        replace(FEW, otherwise=preset("balanced").hide)


def test_numbers_that_callers_give_hold_either_way() -> None:
    both = replace(preset("balanced"), anonymize=replace(FEW, otherwise=PLAIN))
    changed = both.with_(steps=7, strength=0.5).anonymize
    assert (changed.steps, changed.strength) == (7, 0.5)
    assert changed.otherwise is not None
    assert (changed.otherwise.steps, changed.otherwise.strength) == (7, 0.5)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_a_plan_for_ordinary_models(name: str) -> None:
    for plan in (PRESETS[name].anonymize, PRESETS[name].hide):
        bare = plan.fitting(has_few=False, has_surrogates=False)
        assert not bare.distilled
        assert not bare.surrogate
        few = plan.fitting(has_few=True, has_surrogates=False)
        assert few.distilled == plan.distilled
        assert not few.surrogate
        assert not plan.fitting(has_few=False, has_surrogates=True).distilled
        assert plan.fitting(has_few=True, has_surrogates=True) is plan
