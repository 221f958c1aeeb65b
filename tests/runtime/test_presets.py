from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from diffveil.errors import OptionError
from diffveil.plans import Guidance, Inversion, Plan, Preset
from diffveil.presets import DEFAULT_PRESET, PRESETS, preset
from diffveil.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()


def test_paper_anonymizes_as_published() -> None:
    plan = preset("paper").anonymize
    table = plan.table(SCHEDULE)
    assert table.start_timestep == 601
    assert table.timesteps == tuple(range(581, 0, -20))
    assert [step.g for step in table.steps] == [1.0] * 30
    assert (plan.conditional_above, plan.background_below) == (400, 300)
    assert (plan.guidance.normalise, plan.guidance.margin) == ("none", None)


def test_paper_hides_as_published() -> None:
    plan = preset("paper").hide
    table = plan.table(SCHEDULE)
    assert table.start_timestep == 801
    assert table.timesteps == tuple(range(791, 0, -10))
    assert [step.g for step in table.steps] == [1.5 if t > 600 else 2.5 for t in table.timesteps]
    assert (plan.conditional_above, plan.background_below) == (600, 0)


def test_paper_recovers_as_published() -> None:
    recovery = preset("paper").recovery
    assert (recovery.sampler, recovery.steps, recovery.latents) == ("ddim", 100, 1)
    forward, back = recovery.forward(SCHEDULE), recovery.recovery(SCHEDULE)
    assert forward.end_timestep == back.start_timestep == 991
    assert len(forward.steps) == len(back.steps) == 100


def test_fast_is_the_default_and_fast() -> None:
    fast = preset(DEFAULT_PRESET)
    assert fast.name == "fast"
    assert (fast.recovery.sampler, fast.recovery.latents) == ("o-belm", 2)
    assert len(fast.recovery.recovery(SCHEDULE).steps) <= 8
    paper = preset("paper")
    for ours, theirs in ((fast.anonymize, paper.anonymize), (fast.hide, paper.hide)):
        assert 3 * len(ours.table(SCHEDULE).steps) <= len(theirs.table(SCHEDULE).steps)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_consistent(name: str) -> None:
    chosen = PRESETS[name]
    assert chosen.name == name
    forward, back = chosen.recovery.forward(SCHEDULE), chosen.recovery.recovery(SCHEDULE)
    assert forward.end_timestep == (
        back.prev_timestep if chosen.recovery.latents == 2 else back.start_timestep
    )
    for plan in (chosen.anonymize, chosen.hide):
        assert any(step.g > 0.0 for step in plan.table(SCHEDULE).steps)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(OptionError, match="'quick', expected one of: balanced, fast, paper"):
        preset("quick")


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["fast"]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        PRESETS["fast"].anonymize.steps = 3  # type: ignore[misc]


def test_with_replaces_only_what_is_given() -> None:
    fast = preset("fast")
    assert fast.with_() == fast
    changed = fast.with_(steps=20, strength=0.5)
    assert {(p.steps, p.strength) for p in (changed.anonymize, changed.hide)} == {(20, 0.5)}
    assert changed.anonymize.guidance == fast.anonymize.guidance
    assert changed.recovery == fast.recovery
    assert fast.with_(recovery_steps=20).recovery == Inversion("o-belm", 20)
    assert fast.with_(strength=1.0).hide.steps == fast.hide.steps
    with pytest.raises(OptionError, match="steps is 0"):
        fast.with_(steps=0)
    with pytest.raises(OptionError, match="strength is 0"):
        fast.with_(strength=0.0)
    with pytest.raises(OptionError, match="steps is 1"):
        fast.with_(recovery_steps=1)


def test_weights_hold_above_their_timestep() -> None:
    guidance = Guidance(weight=((600, 1.5), (200, 2.5)))
    weights = {t: guidance.weight_at(0, t, 0.5) for t in (999, 601, 600, 201, 200, 0)}
    assert weights == {999: 1.5, 601: 1.5, 600: 2.5, 201: 2.5, 200: 0.0, 0: 0.0}
    assert replace(guidance, scale_with_noise=True).weight_at(0, 700, 0.5) == 0.75
    assert Guidance(weight=((-1, 1.0),)).weight_at(0, 0, 0.1) == 1.0


def test_guidance_can_skip_steps_and_keep_to_a_window() -> None:
    plan = replace(
        preset("paper").anonymize,
        guidance=Guidance(weight=((-1, 1.0),), every=3, window=(101, 500)),
    )
    table = plan.table(SCHEDULE)
    guided = [i for i, step in enumerate(table.steps) if step.g]
    assert guided == [6, 9, 12, 15, 18, 21, 24]
    assert [table.timesteps[i] for i in (guided[0], guided[-1])] == [461, 101]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": ()}, "weight timesteps"),
        ({"weight": ((200, 1.0), (600, 1.0))}, "falling"),
        ({"weight": ((600, 1.0), (600, 2.0))}, "falling"),
        ({"weight": ((1000, 1.0),)}, "expected -1 to 999"),
        ({"weight": ((0, -1.0),)}, "weights are"),
        ({"weight": ((0, float("nan")),)}, "weights are"),
        ({"normalise": "l2"}, "normalise is 'l2'"),
        ({"margin": -1.5}, "margin is -1.5"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"every": 0}, "every is 0"),
        ({"window": (500, 100)}, "window is"),
        ({"window": (0, 1001)}, "window is"),
        ({"mode": "ignore"}, "mode is 'ignore'"),
    ],
)
def test_guidance_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(Guidance(weight=((-1, 1.0),)), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "euler"}, "sampler is 'euler'"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1000}, "steps is 1000"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"conditional_above": -2}, "conditional_above is -2"),
        ({"background_below": 1001}, "background_below is 1001"),
        ({"spacing": "odd"}, "spacing is 'odd'"),
        ({"background": "grey"}, "background is 'grey'"),
        ({"fresh_noise": 1.5}, "fresh_noise is 1.5"),
        ({"fresh_noise": 0.5}, "needs another spacing than 'leading'"),
    ],
)
def test_plan_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(preset("paper").anonymize, **change)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(OptionError, match=r"margin is 2.*every is 0.*window is"):
        Guidance(weight=((-1, 1.0),), margin=2, every=0, window=(9, 1))
    with pytest.raises(OptionError, match=r"steps is 0.*strength is 3.*background_below is -1"):
        replace(preset("fast").hide, steps=0, strength=3.0, background_below=-1)


@pytest.mark.parametrize(
    ("sampler", "steps"), [("o-belm", 1), ("o-belm", 999), ("ddim", 0), ("ddim", 1000), ("x", 5)]
)
def test_inversion_out_of_range(sampler: Any, steps: int) -> None:
    with pytest.raises(OptionError, match="inversion"):
        Inversion(sampler, steps)


@pytest.mark.parametrize(("sampler", "steps"), [("o-belm", 2), ("o-belm", 998), ("ddim", 999)])
def test_inversion_limits_are_those_of_the_samplers(sampler: Any, steps: int) -> None:
    inversion = Inversion(sampler, steps)
    assert len(inversion.forward(SCHEDULE).steps) == steps
    assert inversion.recovery(SCHEDULE).steps


def test_plan_limits_are_those_of_the_samplers() -> None:
    plan = preset("paper").anonymize
    for steps, strength in ((1, 1.0), (999, 1.0), (1, 0.001), (999, 0.001)):
        for spacing in ("leading", "trailing"):
            changed = replace(plan, steps=steps, strength=strength, spacing=spacing)
            assert isinstance(changed, Plan)
            assert changed.table(SCHEDULE).steps


def test_swapped_plans_are_refused() -> None:
    fast = preset("fast")
    with pytest.raises(OptionError, match=r"anonymize guidance.*hide guidance"):
        Preset("swapped", fast.hide, fast.anonymize, fast.recovery)
