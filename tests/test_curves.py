"""The curves benchmark: what it tries, how it judges, and that it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import curves
from benchmarks._curves_report import as_markdown, draw, worst
from benchmarks._refine import refinement
from benchmarks.curves import choices

from diffveil.bundle import Bundle
from diffveil.presets import PRESETS
from diffveil.schedule import NoiseSchedule


def test_every_choice_is_a_plan_of_its_own() -> None:
    all_choices = list(choices(brief=False, guides=["narrow"]))
    names = [(c.operation, c.family, c.name) for c in all_choices]
    assert len(names) == len(set(names))
    for choice in all_choices:
        table = choice.plan.table(NoiseSchedule())
        guided = any(step.g for step in table.steps)
        assert guided or choice.name == "none"
        assert (
            choice.plan.guidance.mode == {"anonymize": "repel", "hide": "attract"}[choice.operation]
        )
    counts = {
        c.name: len(c.plan.table(NoiseSchedule()).steps)
        for c in all_choices
        if c.family.split()[0] in ("ddim", "dpm++2m", "lcm", "tcd")
    }
    assert all(count == int(name.split()[-1]) for name, count in counts.items())


def test_another_bundles_guide_is_asked_in_full() -> None:
    asked = [c for c in choices(brief=False, guides=["narrow"]) if c.guide == "narrow"]
    assert [c.name for c in asked] == ["narrow", "narrow ×2"] * 2
    assert all(c.plan.guidance.through == "pixels" for c in asked)


def test_the_latent_recognizer_is_asked_where_there_is_one() -> None:
    for has_latent in (True, False):
        through = {
            c.plan.guidance.through
            for c in choices(brief=False, has_latent=has_latent)
            if c.family == "guidance"
        }
        assert through == ({"pixels", "latent"} if has_latent else {"pixels"})


def test_brief_means_the_presets() -> None:
    assert len(list(choices(brief=True))) == 2 * len(PRESETS)


def test_distilled_samplers_are_for_distilled_models() -> None:
    for choice in choices(brief=False, has_few=False):
        if choice.family != "presets":
            assert "distilled" not in choice.family
            assert not choice.plan.distilled
    for choice in choices(brief=False):
        if choice.family.split()[0] in ("lcm", "tcd", "ddim", "dpm++2m"):
            assert choice.plan.distilled is ("distilled" in choice.family)


def test_tables_say_what_was_measured() -> None:
    points = [
        {
            "name": choice.name,
            "family": choice.family,
            "operation": choice.operation,
            "faces": 80 if choice.family == "presets" else 24,
            "evaluations": 7,
            "milliseconds": 123.4,
            "worst": 0.0125,
        }
        for choice in choices(brief=False)
    ]
    report = {
        "faces": 80,
        "sweep_faces": 24,
        "bundle": "tiny",
        "backend": "cpu",
        "paper_in_pytorch": {
            "milliseconds": {"one variant": 2000.0, "as released": 9000.0},
            "ratios": {n: {"one variant": 20.5, "as released": 90.5} for n in PRESETS},
        },
        "points": points,
        "recovery": [
            {"sampler": "round trip", "psnr": 30.0},
            {"sampler": "o-belm", "steps": 8, "evaluations": 8, "loss_db": 0.0004},
        ],
        "refinement": [{"steps": 5, "psnr": 31.25, "milliseconds": 400.0}],
        "keys": [{"key_e": "right", "key_i": "right", "psnr": 30.0, "independent": 1.0}],
    }
    text = as_markdown(report)
    assert "| anonymize | fast | 7 | 123 | 20.5 | 90.5 | 1.2% |" in text
    assert "| hide | paper | 7 | 123 |  |  | 1.2% |" in text
    assert "hide above: 24 faces" in text
    assert "| none | anonymize | 24 | 123 | 1.2% |" in text
    assert "| o-belm, 8 steps | 8 | 0.000 |" in text
    assert "| 5 | 31.25 dB | 400 |" in text
    assert "| right | right | 30.00 dB | 100.0% |" in text


def test_a_strangers_key_is_never_the_persons_own() -> None:
    people = ["a", "a", "b", "c", "c", "c"]
    other = curves.strangers(people)
    assert all(people[j] != person for j, person in zip(other, people, strict=True))


def row(same: float, other: float, independent: bool) -> dict[str, Any]:
    return {"same_photo": same, "other_photos": other, "independent": independent}


def test_independent_recognizers_judge_where_there_are_some() -> None:
    record = {"a": row(0.5, 0.9, False), "b": row(0.1, 0.2, True), "c": row(0.05, 0.3, True)}
    assert worst(record, "anonymize") == 0.3
    assert worst(record, "hide") == 0.05
    assert worst({"a": record["a"]}, "hide") == 0.5


def test_it_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    points = [
        {
            "name": choice.name,
            "family": choice.family,
            "operation": choice.operation,
            "milliseconds": float(rng.uniform(50, 900)),
            "worst": float(rng.random()),
        }
        for choice in choices(brief=False)
    ]
    recovery = [
        {"sampler": s, "evaluations": n, "loss_db": 1 / n}
        for s in ("o-belm", "bdia", "ddim")
        for n in (2, 8)
    ]
    draw({"points": points, "recovery": recovery}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_refining_a_latent_brings_it_nearer(tiny_bundle: Bundle) -> None:
    crops = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    records = refinement(tiny_bundle, crops, steps=(0, 3, 12))
    psnr = [record["psnr"] for record in records]
    assert psnr == sorted(psnr)
    assert psnr[0] < psnr[-1]
    assert [record["steps"] for record in records] == [0, 3, 12]
