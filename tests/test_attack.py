"""The restoration attack: pairs that are taken up again, and networks that learn what can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.attack import as_markdown, judge, sheet
from benchmarks.protocol.pairs import Protection, make_pairs, training_files
from benchmarks.protocol.people import Portrait
from benchmarks.protocol.restoration import Budget, Restorer, restore, train
from numpy.typing import NDArray
from PIL import Image

from diffveil.align import template_for
from diffveil.faces import Face

Pixels = NDArray[np.uint8]
FRAME = template_for(32), 32


class _Everywhere:
    """Finds one face in the middle, but none in dark photos."""

    def detect(self, pixels: Pixels, /) -> list[Face]:
        if pixels.mean() < 20:
            return []
        return [Face((4, 4, 28, 28), template_for(32))]


def photos(folder: Path, count: int, rng: np.random.Generator) -> list[Path]:
    for index in range(count):
        path = folder / f"p{index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(60, 200, (32, 32, 3)).astype(np.uint8)).save(path)
    return training_files(folder, set(), count)


def inverted(seen: list[str]) -> dict[str, Protection]:
    def protect(portraits: list[Portrait], first: int) -> list[Pixels]:
        seen.append(f"{first}+{len(portraits)}")
        return [255 - p.pixels for p in portraits]

    return {"inverted": protect}


def test_photos_of_judged_people_are_left_out(tmp_path: Path, rng: np.random.Generator) -> None:
    assert len(photos(tmp_path, 9, rng)) == 9
    left = training_files(tmp_path, {"p1"}, 9)
    assert {path.parent.name for path in left} == {"p0", "p2"}
    assert len(training_files(tmp_path, set(), 4)) == 4
    # The name of the folder itself, or of one above it, says nothing about its photos.
    assert len(training_files(tmp_path, {tmp_path.name}, 9)) == 9


def test_pairs_are_taken_up_where_they_were_left(tmp_path: Path, rng: np.random.Generator) -> None:
    files = photos(tmp_path / "photos", 7, rng)
    Image.new("RGB", (32, 32)).save(files[2])  # no face
    seen: list[str] = []

    def make(rounds: int, **made_with: Any) -> dict[str, Pixels]:
        left = iter([True] * rounds + [False] * 9)
        return make_pairs(
            tmp_path / "pairs",
            files,
            inverted(seen),
            _Everywhere(),
            FRAME,
            made_with=made_with,
            batch=3,
            more=lambda: next(left),
        )

    first = make(1)
    assert len(first["original"]) == 2
    faces = make(9)
    assert seen == ["0+2", "2+3", "5+1"]
    assert faces["original"].shape == faces["inverted"].shape == (6, 32, 32, 3)
    np.testing.assert_array_equal(faces["inverted"], 255 - faces["original"])
    whole = np.stack([np.asarray(Image.open(f)) for f in (*files[:2], *files[3:])])
    np.testing.assert_array_equal(faces["original"], whole)
    make(9)
    assert len(seen) == 3
    with pytest.raises(ValueError, match="made otherwise"):
        make(9, preset="paper")


def _learnable(rng: np.random.Generator) -> tuple[Pixels, dict[str, Pixels]]:
    coarse = rng.integers(40, 216, (24, 4, 4, 3)).astype(np.uint8)
    faces = coarse.repeat(4, 1).repeat(4, 2)
    return faces, {"inverted": 255 - faces, "gone": np.full_like(faces, 128)}


def _error(net: Restorer, protected: Pixels, original: Pixels) -> float:
    return float(np.abs(restore(net, protected).astype(float) - original).mean())


def test_a_network_learns_what_is_there_and_not_what_is_gone(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    faces, protected = _learnable(rng)
    budget = Budget(minutes=5, steps=60, batch=8, rate=3e-3)
    nets, record = train(
        faces[:16],
        {n: p[:16] for n, p in protected.items()},
        budget,
        tmp_path / "networks.pt",
        made_with={},
        width=16,
    )
    assert record["steps"] == 60
    before = float(np.abs(protected["inverted"][16:].astype(float) - faces[16:]).mean())
    assert _error(nets["inverted"], protected["inverted"][16:], faces[16:]) < 0.5 * before
    blind = float(np.abs(128.0 - faces[16:]).mean())
    assert _error(nets["gone"], protected["gone"][16:], faces[16:]) > 0.85 * blind


def test_training_goes_on_from_its_checkpoint(tmp_path: Path, rng: np.random.Generator) -> None:
    faces, protected = _learnable(rng)

    def run(path: Path, steps: int, made_with: dict[str, Any]) -> Restorer:
        budget = Budget(minutes=1e9, steps=steps, batch=4, rate=1e-3)
        nets, record = train(faces, protected, budget, path, made_with=made_with, width=8)
        assert record["steps"] == steps
        return nets["inverted"]

    run(tmp_path / "a.pt", 3, {})
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["record"]["steps"] == 3
    resumed = run(tmp_path / "a.pt", 6, {})
    for key, value in resumed.state_dict().items():
        assert not torch.equal(value, saved["nets"]["inverted"][key]), key
    again = run(tmp_path / "a.pt", 6, {})  # nothing is left to do
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    with pytest.raises(ValueError, match="other pairs"):
        run(tmp_path / "a.pt", 6, {"preset": "paper"})
    assert not list(tmp_path.glob("*.part"))


def test_all_networks_start_alike_and_as_the_identity(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    faces, protected = _learnable(rng)
    budget = Budget(minutes=1, steps=1, batch=2, rate=0.0)
    nets, _ = train(faces, protected, budget, tmp_path / "n.pt", made_with={}, width=8)
    np.testing.assert_array_equal(restore(nets["inverted"], faces), faces)
    states = [net.state_dict() for net in nets.values()]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    with pytest.raises(ValueError, match="no pairs"):
        train(faces[:0], protected, budget, tmp_path / "m.pt", made_with={})


def test_an_attack_is_judged_by_what_it_regains(tmp_path: Path, rng: np.random.Generator) -> None:
    class Average(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(x - 128, 16).flatten(1)

    recognizer = tmp_path / "average.pt"
    with pytest.warns(DeprecationWarning, match="jit"):
        torch.jit.trace(Average(), torch.zeros(1, 3, 112, 112)).save(str(recognizer))
    coarse = rng.integers(0, 256, (8, 4, 4, 3)).repeat(2, 0).astype(np.uint8)
    original = coarse.repeat(32, 1).repeat(32, 2)
    faces = {"original": original, "inverted": 255 - original, "inverted restored": original}
    people = [str(i // 2) for i in range(16)]
    found = judge(faces, people, {"average": recognizer}, {"average"}, template_for(128))
    row = found["recognition"][0]
    assert row["inverted"]["at"]["0.01"]["same_photo"]["value"] == 0
    assert row["inverted restored"]["at"]["0.01"]["same_photo"]["value"] == 1
    assert row["independent"]
    report = {
        "parameters": 1_500_000,
        "training": {"steps": 7, "seconds": 60.0},
        "batch": 4,
        "pairs": 9,
        "faces": 16,
        "people": 8,
        "bundle": "b",
        "preset": "fast",
        "protections": ["inverted"],
        **json.loads(json.dumps(found)),
    }
    text = as_markdown(report)
    assert "| inverted |" in text
    assert "0.0% → 100.0%" in text
    assert sheet(faces, people).shape == (3 * 128, 8 * 128, 3)
