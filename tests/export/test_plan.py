"""Dry runs: sizes are right, and nothing is written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from diffveil.bundle import Bundle
from diffveil_export import cli, storage
from diffveil_export.models import reference
from diffveil_export.plan import plan_export, total_bytes
from tiny_models import tiny_components


def test_plan_agrees_with_the_export(tiny_bundle: Bundle) -> None:
    components = tiny_components()
    plans = {plan.program: plan for plan in plan_export(components, "int8", "float32")}
    assert list(plans) == list(tiny_bundle.manifest.programs)
    for name, program in tiny_bundle.manifest.programs.items():
        assert program.cost is not None
        # The plan counts convolutions and products, the graph every operation.
        assert 0.3 * program.cost.flops < plans[name].flops <= 1.05 * program.cost.flops
        assert plans[name].seconds > 0
    parameters = sum(p.numel() for p in components.modules()["autoencoder"].parameters())
    assert plans["decode"].parameters < plans["guide"].parameters
    assert parameters < total_bytes(components, "int8", "float32")
    assert total_bytes(components, "int8", "float16") == 2 * total_bytes(
        components, "int8", "float32"
    )


def test_four_bits_are_counted_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    components = tiny_components()
    before = total_bytes(components, "int8", "float32")
    assert total_bytes(components, "int4", "float32") == before  # a tiny model's are all small
    monkeypatch.setattr(storage, "_LARGE", 2048)
    unet = components.modules()["unet"].named_parameters()
    count = sum(p.numel() for n, p in unet if p.ndim > 1 and storage.in_blocks(n, p.shape))
    assert count > 2048
    after = total_bytes(components, "int4", "float32")
    assert before - after == pytest.approx(count * (1 - 0.5625), abs=1)
    plans = {p.program: p.weight_bytes for p in plan_export(components, "int4", "float32")}
    assert plans["denoise"] < total_bytes(components, "int8", "float32")
    assert (
        plans["decode"]
        == {p.program: p.weight_bytes for p in plan_export(components, "int8", "float32")}["decode"]
    )


def test_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "is_reference_folder", lambda folder: True)
    monkeypatch.setattr(reference, "load_reference", lambda folder, _: tiny_components())
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    target = tmp_path / "bundle"
    words = ["model", "-o", str(target), "--dry-run", "--precision", "float16"]
    assert cli.run(parser.parse_args(words)) == 0
    text = capsys.readouterr().out
    assert "guide" in text
    assert "float16 weights" in text
    assert cli.run(parser.parse_args([*words, "--json"])) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["program"] for row in rows} == {
        "encode", "decode", "embed", "expand", "denoise", "recognize", "guide"
    }  # fmt: skip
    assert all(row["stored"] == "float16" for row in rows)
    assert not list(tmp_path.iterdir())
