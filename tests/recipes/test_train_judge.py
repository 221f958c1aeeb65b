"""What the judge of drawn faces learns from: grades read beside the faces that they are about."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes/reference"))

from common import Clock, Run, chances
from draw_for_grading import rows_to_draw
from train_judge import Graded, Lesson, area, learn_along, learned, load_graded, trained, within

from diffveil_export.reference.judge import FaceJudge
from diffveil_export.reference.recognizer import FaceRecognizer

FACTS = {"verb": "hide", "preset": "fast", "seed": 3, "drawn_by": "abc"}


def graded_folder(work: Path, grades: list[str], count: int = 6) -> Path:
    """Faces of two sheets, and a file with grades of them."""
    folder = work / "grading" / "hide-3"
    folder.mkdir(parents=True)
    (folder / "drawn.json").write_text(json.dumps(FACTS))
    for sheet in range(2):
        first = sheet * count // 2
        numbers = np.arange(first, first + count // 2)
        faces = np.broadcast_to(numbers[:, None, None, None], (count // 2, 3, 128, 128))
        arrays: dict[str, Any] = {"drawn": faces / 8}
        arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
        np.savez(folder / f"{sheet:03d}.npz", **arrays, rows=numbers + 3)
    file = work / "grades.json"
    file.write_text(json.dumps([{"drawn": FACTS, "grades": grades}]))
    return file


def test_grades_are_means_of_those_that_were_given(tmp_path: Path) -> None:
    graded = load_graded(tmp_path, graded_folder(tmp_path, ["0.2121", "1.210."]))
    assert graded.grades.tolist() == [0.25, 1.0, 0.5, 0.5, 0.5]  # the second face has none
    assert graded.faces[:, 0, 0, 0].tolist() == [0, 2 / 8, 3 / 8, 4 / 8, 5 / 8]
    assert graded.held_out.tolist() == [False, True, False, False, False]  # row 5


def test_faces_drawn_since_the_grades_were_given_are_none_of_theirs(tmp_path: Path) -> None:
    graded = load_graded(tmp_path, graded_folder(tmp_path, ["012"]))
    assert graded.grades.tolist() == [0.0, 0.5, 1.0]


def test_grades_of_other_faces_are_refused(tmp_path: Path) -> None:
    file = graded_folder(tmp_path, ["012012"])
    other = json.loads(file.read_text())
    other[0]["drawn"]["drawn_by"] = "other weights"
    file.write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="other weights or another plan"):
        load_graded(tmp_path, file)


def test_grades_in_halves_count_as_much(tmp_path: Path) -> None:
    file = graded_folder(tmp_path, ["012344"])
    entry = json.loads(file.read_text())[0]
    file.write_text(json.dumps([entry | {"best": 4}]))
    assert load_graded(tmp_path, file).grades.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_grades_of_better_faces_are_brought_to_their_level(tmp_path: Path) -> None:
    file = graded_folder(tmp_path, ["0112.2"])
    entry = json.loads(file.read_text())[0]  # their mean is 0.6
    file.write_text(json.dumps([entry | {"level": 0.8}]))
    expected = [0.2, 0.7, 0.7, 1.0, 1.0]  # none is more than the best
    np.testing.assert_allclose(load_graded(tmp_path, file).grades, expected, rtol=1e-6)


def test_draws_are_compared_with_those_of_their_photo() -> None:
    rng = np.random.default_rng()
    photos = np.repeat(rng.permutation(20), 5)
    easy, better = rng.standard_normal(20)[photos], rng.standard_normal(100)
    assert within(easy * 7 + better, better - 3 * easy, photos) == pytest.approx(1)
    assert np.isnan(within(better, easy, np.arange(100)))


def test_photos_are_told_apart_by_folder() -> None:
    rows, sheets = np.array([7, 7, 7, 9]), np.array([0, 0, 1, 0])
    photos = Graded(torch.zeros(4, 1), torch.zeros(4), rows, sheets).photos
    assert photos[0] == photos[1]
    assert len(set(photos)) == 3


def test_without_faces_it_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "grades.json"
    file.write_text(json.dumps([{"drawn": FACTS, "grades": ["0"]}]))
    with pytest.raises(SystemExit, match=r"draw_for_grading\.py"):
        load_graded(tmp_path, file)


def test_area_is_how_often_a_positive_outscores_a_negative() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.permutation(40) / 40, rng.random(40) < 0.3
    wins = scores[positive][:, None] > scores[~positive]
    assert area(scores, positive) == pytest.approx(wins.mean())


def test_rows_are_reproducible_and_never_drawn_twice() -> None:
    names = [f"celeba/{i}" for i in range(30)] + [f"utkface/{i}" for i in range(50)]
    rows = list(rows_to_draw(names, 4))
    assert len(rows) == len(set(rows))
    assert rows == list(rows_to_draw(names, 4))
    assert rows != list(rows_to_draw(names, 5))
    whole = np.mean([row < 30 for row in rows[:25]])
    assert 0.3 < whole < 0.9


def test_the_grades_that_ship_are_grades() -> None:
    file = Path(__file__).resolve().parents[2] / "recipes/reference/grades.json"
    for entry in json.loads(file.read_text()):
        lengths = {len(grades) for grades in entry["grades"]}
        assert len(lengths) == 1
        digits = "".join(map(str, range(entry.get("best", 2) + 1)))
        assert set("".join(entry["grades"])) <= set(digits + ".")
        assert set(entry["drawn"]) - {"draws"} == set(FACTS)


def test_heads_learn_what_the_grades_are_about() -> None:
    """Grades that follow one channel at one place, beside noise."""
    rng = torch.Generator().manual_seed(0)
    maps = torch.randn(600, 6, 14, 14, generator=rng)
    maps[:, 2, 4:8, 4:8] += 1.5 * torch.randn(600, 1, 1, generator=rng)
    grades = maps[:, 2, 4:8, 4:8].mean((1, 2)).mul(3).sigmoid()
    other = torch.randn(600, 4, 4, 4, generator=rng)
    rows = np.arange(600)
    heads = trained([[maps, other]], grades, rows[100:], 150)
    with torch.no_grad():
        found = heads([maps[:100], other[:100]]).numpy()
    assert np.corrcoef(found, grades[:100].numpy())[0, 1] > 0.8


def test_others_speak_of_photos_that_they_have_not_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """Grades that nothing shows: who learned them by heart would know them."""
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.standard_normal((200, 4, 7, 7)).astype(np.float32))
    grades = torch.from_numpy(rng.random(200).astype(np.float32))
    rows = np.arange(200)
    graded = Graded(torch.zeros(200, 1), grades, rows, np.zeros(200, int))
    seen = [[maps, maps[:, :, :4, :4]]]
    heads, said = learned("nobody", seen, graded, rows, 300)
    with torch.no_grad():
        own = heads(seen[0]).numpy()
    assert np.corrcoef(own, grades.numpy())[0, 1] > 0.5
    assert abs(np.corrcoef(said, grades.numpy())[0, 1]) < 0.3
    assert capsys.readouterr().out.startswith("nobody: area")


class StepClock(Clock):
    """A budget in steps: what is learned does not depend on the machine."""

    def tick(self) -> float:
        self.spent += 1
        return self.spent / self.budget


def test_what_a_judge_sees_with_learns_along(tmp_path: Path) -> None:
    """Faces graded by how bright they are at one place; a run that ended is gone on from."""
    rng = np.random.default_rng(0)
    faces = torch.from_numpy(rng.uniform(-0.2, 0.2, (64, 3, 128, 128)).astype(np.float16))
    grades = torch.from_numpy((np.arange(64) % 2).astype(np.float32))
    faces[1::2, :, 40:60, 40:60] += 0.7
    graded = Graded(faces, grades, np.r_[np.arange(32), np.arange(32) // 2], np.zeros(64, int))
    rows = np.arange(64)

    def run_for(steps: int, *, other: bool = False) -> tuple[FaceJudge, Run]:
        torch.manual_seed(0)
        judge = FaceJudge(FaceRecognizer(8, 112, (8, 12, 16), (1, 1, 1), 5).fuse())
        with torch.no_grad():
            judge.heads.measure(judge.features(faces.float()))
        optimizer = torch.optim.AdamW(judge.parameters())
        lesson = Lesson(graded, rows, heard_teacher=other)
        parts = {"lesson": lesson, "network": judge, "optimizer": optimizer}
        run = Run(tmp_path / "judge-training.ckpt", parts, StepClock(steps / 60, 0.05))
        learn_along(judge, graded, grades, rows, run, optimizer, 16)
        return judge, run

    judge, run = run_for(60)
    assert run.step == 59
    with torch.no_grad():
        found = judge(faces.float()).numpy()
    assert np.corrcoef(found, grades.numpy())[0, 1] > 0.8
    same, ended = run_for(60)
    assert ended.step == run.step
    torch.testing.assert_close(same.state_dict(), judge.state_dict())
    longer, on = run_for(80)
    assert on.step > run.step
    assert not torch.equal(longer.trunk[1].conv1.weight, judge.trunk[1].conv1.weight)
    with pytest.raises(SystemExit, match="other faces, grades or a teacher"):
        run_for(80, other=True)


def test_half_of_what_is_drawn_is_of_a_rare_kind() -> None:
    kind = np.arange(50) < 5
    found = chances(kind, 0.5)
    assert found.sum() == pytest.approx(1)
    assert found[kind].sum() == pytest.approx(0.5)
    assert len(set(found[~kind])) == 1
    for alike in (kind[:5], kind[5:]):
        np.testing.assert_allclose(chances(alike, 0.5), 1 / len(alike))
