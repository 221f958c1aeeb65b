"""`benchmarks.quality` and `benchmarks.attack` from end to end, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from benchmarks import attack, quality
from benchmarks.protocol import report as protocol_report
from onnx import TensorProto, helper
from PIL import Image

from diffveil import Face
from diffveil.align import template_for
from fake_photos import smooth_photo


class _Middle:
    """Finds one face in the middle of every photo."""

    @classmethod
    def load(cls, threads: int | None = None) -> _Middle:
        return cls()

    def detect(self, pixels: Any, /) -> list[Face]:
        return [Face((8, 8, 40, 40), template_for(32) + 8)]


@pytest.fixture
def people(tmp_path: Path, rng: np.random.Generator) -> Path:
    for person in ("ann", "bob", "cleo"):
        (tmp_path / "people" / person).mkdir(parents=True)
        for index in range(3):
            photo = smooth_photo(rng, 48, 48)
            Image.fromarray(photo).save(tmp_path / "people" / person / f"{index}.png")
    (tmp_path / "people" / "attributes.csv").write_text("person,hat\nann,yes\nbob,no\ncleo,no\n")
    return tmp_path / "people"


@pytest.fixture
def recognizer(tmp_path: Path) -> Path:
    """Means of 14×14 pixels, as ONNX."""
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["x"], ["a"], kernel_shape=[14, 14], strides=[14, 14]),
            helper.make_node("Flatten", ["a"], ["y"]),
        ],
        "means",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 192])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "means.onnx")
    return tmp_path / "means.onnx"


def test_quality_measures_all_tables(
    people: Path,
    recognizer: Path,
    tiny_bundle_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(quality, "CenterFace", _Middle)
    document = tmp_path / "results.md"
    document.write_text("<!-- quality:begin -->\n<!-- quality:end -->\n")
    out = tmp_path / "out"
    arguments = f"{people} --independent means={recognizer} --bundle {tiny_bundle_path} --photos 2"
    arguments += f" --gallery 3 --few 2 --repeats 1 --threads 1 --out {out} --document {document}"
    assert quality.main(arguments.split()) == 0
    report = json.loads((out / "quality.json").read_text())
    assert (report["faces"], report["people"]) == (6, 3)
    found = report["protocol"]
    assert [r["kind"] for r in found["verification"]] == ["independent", "guided against"]
    assert all(row["gallery"] == 9 for row in found["verification"])
    original = found["verification"][0]["original"]
    assert original["cosine"] == pytest.approx(1, abs=1e-4)
    assert original["at"]["0.01"]["same_photo"]["value"] == 1
    assert set(found["robustness"]["means"]) == set(found["recovery"]["under"])
    assert found["recovery"]["refused_of_another_size"] == 1
    # A random model redraws nothing of a face: that keys count is for trained ones to show.
    assert (found["keys"][0]["key_e"], found["keys"][0]["key_i"]) == ("right", "right")
    assert len({(k["key_e"], k["key_i"], k["psnr"]) for k in found["keys"]}) == 5
    assert {(g["attribute"], g["value"], g["faces"]) for g in found["groups"]} == {
        ("hat", "yes", 2),
        ("hat", "no", 4),
        ("head", "frontal", 6),
    }
    names = {path.name for path in out.iterdir()}
    assert {"cosines.png", "contact-sheet.png", "quality.md", "protocol.md"} < names
    sheets = {f"sheet-{kind}.png" for kind in ("anonymize", "hide", "recover", "blur", "mosaic")}
    assert sheets < names
    text = document.read_text()
    assert text.count("**") == 2 * 9
    assert (out / "protocol.md").read_text() in text
    assert "speed | mosaic" in capsys.readouterr().out
    # A run that was broken off leaves what it had.
    del report["protocol"]["robustness"]
    assert "Robustness of protection" not in protocol_report.as_markdown(report)


def test_quality_says_what_is_wrong_before_it_measures(
    people: Path, tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quality, "CenterFace", _Middle)
    base = [str(people), "--bundle", str(tiny_bundle_path), "--out", str(tmp_path / "out")]
    (tmp_path / "faces.txt").write_text("")
    for wrong in (
        ["--max-people", "1"],
        ["--attributes", str(tmp_path / "none.csv")],
        ["--recognizer", f"a={tmp_path / 'faces.txt'}"],
    ):
        with pytest.raises(SystemExit) as stopped:
            quality.main([*base, *wrong])
        assert stopped.value.code == 2
    assert not (tmp_path / "out").exists()


def test_an_attack_runs_and_leaves_judged_people_out(
    people: Path,
    recognizer: Path,
    tiny_bundle_path: Path,
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attack, "CenterFace", _Middle)
    for name in ("ann", "zoe"):
        (tmp_path / "train" / name).mkdir(parents=True)
        photo = smooth_photo(rng, 48, 48)
        Image.fromarray(photo).save(tmp_path / "train" / name / "0.png")
    out = tmp_path / "out"
    arguments = f"{tmp_path / 'train'} {people} --recognizer means={recognizer}"
    arguments += f" --bundle {tiny_bundle_path} --steps 2 --width 8 --batch 2 --photos 1"
    arguments += f" --threads 1 --out {out}"
    assert attack.main(arguments.split()) == 0
    report = json.loads((out / "attack.json").read_text())
    assert report["pairs"] == 1  # not ann's, who is judged
    assert report["training"]["steps"] == 2
    assert set(report["psnr"]) == {
        kind + suffix for kind in ("anonymize", "blur", "mosaic") for suffix in ("", " restored")
    }
    assert (out / "attack.png").exists()
    with pytest.raises(SystemExit, match="made otherwise"):
        attack.main([*arguments.split(), "--preset", "balanced"])
