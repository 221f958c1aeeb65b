"""The GPU benchmark runs end to end on a CPU at a tiny size, and says that this is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import gpu
from benchmarks._gpu_bundle import SIZES, random_components
from benchmarks._gpu_gan import GanAnonymizer, StyleEncoder, StyleGenerator
from benchmarks._gpu_report import Results, as_markdown, draw
from benchmarks._gpu_timing import timed

FACTS = {
    "device_note": "note",
    "bundle": "b",
    "precision": "float32",
    "device": "d",
    "versions": {"p": "1", "q": None},
    "command": "c",
}


def test_it_runs_end_to_end(
    tiny_bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tiny", "--bundle", str(tiny_bundle_path), "--out", str(tmp_path)]
    words += ["--batches", "2", "--seconds", "0", "--only", "ours"]
    assert gpu.main(words) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "No GPU was found" in report["device_note"] or report["gpu"]
    rows = report["rows"]
    by_kind = {kind: [r for r in rows if r["kind"] == kind] for kind in {r["kind"] for r in rows}}
    # Correctness comes before any time of a backend; what cannot run says why.
    assert {r["backend"] for r in by_kind["correctness"]} >= {"cpu", "tensorrt-rtx"}
    kinds = [r["kind"] for r in rows if r["backend"] == "cpu"]
    assert kinds[0] == "correctness"
    programs = {r["name"]: r for r in by_kind["program"] if r["backend"] == "cpu"}
    assert set(programs) >= {"encode", "denoise", "guide", "decode"}
    assert all(r["p50_ms"] <= r["p90_ms"] and r["tflops"] > 0 for r in programs.values())
    operations = {(r["name"], r["preset"]) for r in by_kind["operation"] if "p50_ms" in r}
    assert operations == {
        (name, preset)
        for name in ("anonymize", "hide", "recover")
        for preset in ("fast", "balanced", "paper")
    }
    text = (tmp_path / "gpu.md").read_text()
    assert text in capsys.readouterr().out
    assert "## Programs" in text


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_pytorchs_side_runs(tmp_path: Path) -> None:
    from benchmarks._gpu_torch import gan_cases, paper_cases, torch_device

    size, device = SIZES["tiny"], torch.device("cpu")
    given = (device, "float32", ("eager", "compile"), (1,), "eager")
    calls = {
        (name, mode): call
        for name, mode, _, call in paper_cases(random_components(size), *given)  # type: ignore[arg-type]
    }
    assert set(calls) == {
        (name, mode) for name in ("anonymize", "hide", "recover") for mode in ("eager", "compile")
    }
    image = calls["anonymize", "compile"]()
    assert isinstance(image, torch.Tensor)
    assert image.shape == (1, 1, 3, 32, 32)
    for _, _, batch, call in gan_cases(size, *given):  # type: ignore[arg-type]
        picture = call()
        assert isinstance(picture, torch.Tensor)
        assert picture.shape == (batch, 3, 16, 16)
    assert torch_device().type in ("cpu", "cuda")


def test_the_gan_has_the_published_size() -> None:
    """Parameters as the papers' networks have them: about 30 million without the mapping network,
    and 18 style vectors from three levels.
    """
    with torch.device("meta"):
        generator = StyleGenerator()
    assert generator.styles == 18
    assert 27e6 < sum(p.numel() for p in generator.parameters()) < 30e6
    widths = [conv.conv.weight.shape[0] for conv in generator.convs]  # type: ignore[union-attr]
    assert widths[::2] == [512, 512, 512, 512, 256, 128, 64, 32]


def test_a_small_gan_draws_what_it_should() -> None:
    network = GanAnonymizer((32, 16), (64, 16)).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 3, 32, 32)
        assert network.encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 16)
    assert network.encoder.levels == [2, 2, 2, 1, 1, 1, 1, 0]


def test_the_encoder_reads_the_published_levels() -> None:
    encoder = StyleEncoder()
    assert encoder.taps == [6, 20, 23]
    assert [encoder.levels.count(level) for level in (2, 1, 0)] == [3, 4, 11]
    assert [len(block.convs) // 2 for block in encoder.blocks] == [4] * 3 + [5] * 4 + [6] * 11  # type: ignore[arg-type]


def test_rows_are_kept_as_they_come(tmp_path: Path) -> None:
    results = Results(tmp_path, FACTS)
    results.add({"kind": "program", "name": "a", "backend": "x", "batch": 1, "p50_ms": 1.0})
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 1
    results.add({"kind": "program", "name": "b", "backend": "x", "batch": 1, "error": "a | b\nc"})
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 2
    assert [f.name for f in tmp_path.iterdir()] == ["gpu.json"]
    table = [line for line in results.finish().splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_a_chart_needs_something_to_show(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {"kind": "operation", "name": "anonymize", "backend": "x", "preset": None}
    assert not draw([row], tmp_path / "none.png")
    assert draw([{**row, "ms_a_face": 3.0}], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert "note" in as_markdown({**FACTS, "rows": []})


def test_time_is_counted_in_calls() -> None:
    calls: list[int] = []
    timing = timed(lambda: calls.append(1), 0.0, fewest=4, warm_up=2)
    assert timing.calls == 4
    assert len(calls) == 6
    row = timing.record(8, flops=1e6, peak=1e12)
    assert row["share"] == pytest.approx(row["tflops"])
