"""The loop through program `step` by ordinary calls, on fakes: the same faces as without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from diffveil.engines import Loop, Programs
from diffveil.engines._loop import PlainLoop
from diffveil.errors import EngineError
from diffveil.fused import can_run_fused
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.plans import Guidance, Plan
from diffveil.presets import preset
from diffveil.programs import OPTIONAL_PROGRAMS, PROGRAMS
from diffveil.samplers.table import COEFFICIENTS, Step
from diffveil.schedule import NoiseSchedule
from fake_programs import FakeBackend, fake_programs

F32 = NDArray[np.float32]
_PLAIN = preset("fast").anonymize.fitting(has_few=False, has_surrogates=False)
_PLAIN_HIDE = preset("fast").hide.fitting(has_few=False, has_surrogates=False)
_GUIDANCE = replace(_PLAIN.guidance, through="pixels", repeats=1)
ANONYMIZE = replace(_PLAIN, guidance=_GUIDANCE, steps=5, redraws=0)
HIDE = replace(_PLAIN_HIDE, guidance=replace(_PLAIN_HIDE.guidance, repeats=1), steps=4, redraws=0)


@pytest.fixture
def crops(rng: np.random.Generator) -> F32:
    return rng.uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def fused(tmp_path: Path) -> Programs:
    return fake_programs(tmp_path / "fused", optional=["step"])


@pytest.fixture
def separate(tmp_path: Path) -> Programs:
    return fake_programs(tmp_path / "separate")


def calls(programs: Programs, program: str) -> list[dict[str, Any]]:
    assert isinstance(programs.backend, FakeBackend)
    return programs.backend.inputs(program)


def protect(programs: Programs, crops: F32, plan: Plan, variants: int, **options: Any) -> F32:
    operations = FaceOperations(programs, **options)
    act = operations.anonymize if plan.guidance.mode == "repel" else operations.hide
    keys = [NoiseKey.from_seed(face) for face in range(len(crops))]
    return act(crops, plan, keys=keys, variants=variants)


def test_a_step_is_its_coefficients() -> None:
    numbers = tuple(float(i) for i in range(8))
    step = Step(500, 400, *numbers)
    assert step.coefficients == numbers
    assert [getattr(step, name) for name in COEFFICIENTS] == list(numbers)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m", "lcm"])
@pytest.mark.parametrize("faces", [1, 3])
@pytest.mark.parametrize("plan", [ANONYMIZE, HIDE], ids=["anonymize", "hide"])
def test_it_protects_as_the_programs_do_one_by_one(
    fused: Programs,
    separate: Programs,
    crops: F32,
    plan: Plan,
    faces: int,
    sampler: Literal["ddim", "dpm++2m", "lcm"],
) -> None:
    plan = replace(plan, sampler=sampler)
    for variants in (1, 2):
        ours = protect(fused, crops[:faces], plan, variants)
        theirs = protect(separate, crops[:faces], plan, variants)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert calls(fused, "step")
    assert not calls(fused, "denoise")


@pytest.mark.parametrize(
    "change",
    [
        {"margin": None},
        {"margin": 0.05},
        {"margin": -0.9},
        {"margin": 0.9},
        {"normalise": "none", "weight": ((-1, 3.0),)},
    ],
)
@pytest.mark.parametrize("plan", [ANONYMIZE, HIDE], ids=["anonymize", "hide"])
def test_margins_and_sizes_are_those_of_guidance(
    fused: Programs, separate: Programs, crops: F32, plan: Plan, change: dict[str, Any]
) -> None:
    plan = replace(plan, guidance=replace(plan.guidance, **change))
    ours = protect(fused, crops, plan, 2)
    np.testing.assert_allclose(ours, protect(separate, crops, plan, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("background", ["noised", "clean"])
@pytest.mark.parametrize("below", [0, 1000])
def test_backgrounds_are_kept(
    fused: Programs,
    separate: Programs,
    crops: F32,
    background: Literal["noised", "clean"],
    below: int,
) -> None:
    plan = replace(ANONYMIZE, background=background, background_below=below)
    ours = protect(fused, crops, plan, 1)
    np.testing.assert_allclose(ours, protect(separate, crops, plan, 1), rtol=0, atol=1e-5)


def test_batches_are_bounded_and_families_stay_together(fused: Programs, crops: F32) -> None:
    whole = protect(fused, crops, ANONYMIZE, 2)
    calls(fused, "step").clear()
    seen: list[tuple[int, int]] = []
    operations = FaceOperations(fused, max_batch=4)
    parts = operations.anonymize(
        crops,
        ANONYMIZE,
        keys=[NoiseKey.from_seed(face) for face in range(3)],
        variants=2,
        progress=lambda *state: seen.append(state),
    )
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)
    assert {len(call["latent"]) for call in calls(fused, "step")[4:]} == {2, 4}
    assert seen == [(i, 4) for i in (1, 2, 3, 4)]


def test_what_is_not_finite_is_an_error(fused: Programs, crops: F32) -> None:
    backend = fused.backend
    assert isinstance(backend, FakeBackend)
    broken: Callable[..., dict[str, Any]] = lambda **inputs: {  # noqa: E731
        **FakeBackend.step(backend, **inputs),
        "next": np.full_like(inputs["latent"], np.nan),
    }
    backend.overrides["step"] = broken
    with pytest.raises(EngineError, match="not finite"):
        protect(fused, crops, ANONYMIZE, 1)


@pytest.mark.parametrize(
    ("change", "able"),
    [
        ({}, True),
        ({"through": "latent"}, True),  # without such a program the full gradient is meant
        ({"repeats": 2}, False),
        ({"every": 2}, False),
        ({"every": 2, "reuse": True}, False),
        ({"weight": ((500, 1.0),)}, False),
        ({"weight": ((-1, 0.0),)}, False),
    ],
)
def test_which_plans_it_is_for(
    fused: Programs, separate: Programs, change: dict[str, Any], able: bool
) -> None:
    guidance: Guidance = replace(_GUIDANCE, **change)
    plan = replace(ANONYMIZE, guidance=guidance)
    table = plan.table(NoiseSchedule())
    assert can_run_fused(fused, plan, table) is able
    assert not can_run_fused(separate, plan, table)


def test_a_step_of_other_parts_is_not_taken(tmp_path: Path) -> None:
    programs = fake_programs(tmp_path, optional=["guide_latent", "step"])
    table = ANONYMIZE.table(NoiseSchedule())
    latent = replace(ANONYMIZE, guidance=replace(_GUIDANCE, through="latent"))
    assert can_run_fused(programs, ANONYMIZE, table)
    assert not can_run_fused(programs, latent, table)
    assert not can_run_fused(programs, replace(ANONYMIZE, distilled=True), table)


def test_a_loop_of_ordinary_calls_carries_over(fused: Programs) -> None:
    loop: Loop = PlainLoop(fused.engine("encode"), ())
    with pytest.raises(EngineError, match="image: missing"):
        loop.step()
    with pytest.raises(EngineError, match="no output"):
        loop.get("latent")
    image = np.zeros((1, 3, 32, 32), np.float32)
    loop.put(image=image)
    image += 1  # the loop holds a copy
    loop.step()
    assert not loop.get("latent").any()


def test_the_step_takes_what_its_parts_take() -> None:
    inputs = {t.name: t for t in OPTIONAL_PROGRAMS["step"].inputs}
    for part in ("denoise", "guide"):
        for tensor in PROGRAMS[part].inputs:
            assert tensor.name == "x0" or inputs[tensor.name] == tensor
