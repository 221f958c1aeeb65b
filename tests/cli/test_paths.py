"""Which files the command line reads and where it writes; nothing is computed here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffveil.cli.exits import UsageError
from diffveil.cli.paths import READABLE, Found, find_keys, find_photos, plan_jobs, plan_keys
from diffveil.errors import OptionError
from diffveil.photos import save_photo


@pytest.fixture(autouse=True)
def _inside_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(name.encode())


def outputs(arguments: list[str], output: str | None = None, variants: int = 1) -> list[list[str]]:
    jobs = plan_jobs(find_photos(arguments), output, tag="anonymized", variants=variants)
    return [[path.as_posix() for path in job.outputs] for job in jobs]


def test_one_photo_is_written_beside_itself() -> None:
    touch("a/b.c.jpg")
    assert outputs(["a/b.c.jpg"]) == [["a/b.c-anonymized.jpg"]]


def test_a_format_that_cannot_be_written_becomes_png() -> None:
    touch("a.heic")
    assert outputs(["a.heic"]) == [["a-anonymized.png"]]


def test_variants_are_numbered() -> None:
    touch("a.jpg")
    assert outputs(["a.jpg"], variants=2) == [["a-anonymized-1.jpg", "a-anonymized-2.jpg"]]
    assert outputs(["a.jpg"], "x.png", variants=2) == [["x-1.png", "x-2.png"]]


def test_a_file_or_a_folder_for_one_photo() -> None:
    touch("a.jpg")
    Path("there").mkdir()
    assert outputs(["a.jpg"], "x.png") == [["x.png"]]
    assert outputs(["a.jpg"], "there") == [["there/a.jpg"]]
    assert outputs(["a.jpg"], "new/") == [["new/a.jpg"]]
    assert outputs(["*.jpg"], "new") == [["new/a.jpg"]]


def test_a_folder_keeps_its_shape_and_its_photos_only() -> None:
    touch("in/b.png", "in/sub/a.JPG", "in/notes.txt", "in/.hidden/c.jpg")
    found = outputs(["in"], "out")
    assert found == [["out/.hidden/c.jpg"], ["out/b.png"], ["out/sub/a.JPG"]]


def test_results_inside_the_folder_are_not_inputs_again() -> None:
    touch("in/a.jpg", "in/out/a.jpg")
    found = find_photos(["in"], exclude=Path("in/out"))
    assert [photo.path.as_posix() for photo in found] == ["in/a.jpg"]


@pytest.mark.parametrize("output", [".", "out"])
def test_results_above_or_beside_the_folder_hide_none_of_its_photos(output: str) -> None:
    touch("in/a.jpg", "out/b.jpg")
    found = find_photos(["in"], exclude=Path(output))
    assert [photo.path.as_posix() for photo in found] == ["in/a.jpg"]
    assert outputs(["in"], output) == [[f"{output}/a.jpg".removeprefix("./")]]


def test_results_in_the_folder_itself_would_overwrite_it() -> None:
    touch("in/a.jpg")
    photos = find_photos(["in"], exclude=Path("in"))
    with pytest.raises(UsageError, match="overwrite an input"):
        plan_jobs(photos, "in", tag="anonymized")


def test_globs_that_no_shell_expanded_and_files_named_like_globs() -> None:
    touch("cam-1.png", "cam-2.png", "odd[1].png")
    assert len(find_photos(["cam-*.png"])) == 2
    assert [photo.path.name for photo in find_photos(["odd[1].png"])] == ["odd[1].png"]


def test_a_photo_named_twice_is_read_once() -> None:
    touch("a.jpg")
    assert len(find_photos(["a.jpg", "./a.jpg", "*.jpg"])) == 1


@pytest.mark.parametrize("argument", ["none.jpg", "none-*.jpg", "empty"])
def test_arguments_without_photos(argument: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(UsageError, match=argument.replace("*", r"\*")):
        find_photos([argument])


@pytest.mark.parametrize("output", ["a.jpg", "./a.jpg", "link.jpg", "hard.jpg", "b.jpg"])
def test_an_input_is_never_overwritten(output: str) -> None:
    touch("a.jpg", "b.jpg")
    os.symlink("a.jpg", "link.jpg")
    os.link("a.jpg", "hard.jpg")
    inputs = ["a.jpg", "b.jpg"] if output == "b.jpg" else ["a.jpg"]
    target = "." if output == "b.jpg" else output
    with pytest.raises(UsageError, match="overwrite an input"):
        outputs(inputs, target)


def test_a_numbered_variant_does_not_overwrite_an_input_either() -> None:
    touch("x.jpg", "x-2.jpg")
    with pytest.raises(UsageError, match="overwrite an input"):
        outputs(["x.jpg", "x-2.jpg"], "./", variants=2)


def test_two_results_never_share_a_place() -> None:
    touch("a/x.jpg", "b/x.jpg")
    with pytest.raises(UsageError, match=r"a/x\.jpg and b/x\.jpg"):
        outputs(["a/x.jpg", "b/x.jpg"], "out")


@pytest.mark.parametrize(
    ("arguments", "output", "message"),
    [
        (["a.jpg", "b.jpg"], "notes.txt", "several photos need a folder"),
        (["a.jpg"], "x.gif", "suffix"),
        (["a.jpg"], "note", "suffix"),
        (["."], None, "-o FOLDER"),
    ],
)
def test_outputs_that_cannot_be_meant(
    arguments: list[str], output: str | None, message: str
) -> None:
    touch("a.jpg", "b.jpg", "notes.txt", "note")
    with pytest.raises(UsageError, match=message):
        outputs(arguments, output)


def keys_of(
    arguments: list[str], key: str, output: str | None = None, variants: int = 1
) -> list[str]:
    jobs = plan_jobs(find_photos(arguments), output, tag="anonymized", variants=variants)
    return [path.as_posix() for path in plan_keys(jobs, key)]


def test_one_photo_one_key_file_several_a_folder() -> None:
    touch("a.jpg", "b.jpg")
    assert keys_of(["a.jpg"], "k.veilkey") == ["k.veilkey"]
    assert keys_of(["a.jpg", "b.jpg"], "keys", "out") == [
        "keys/a.jpg.veilkey",
        "keys/b.jpg.veilkey",
    ]


def test_same_stem_in_two_formats_gives_two_keys() -> None:
    touch("a.jpg", "a.png")
    assert len(set(keys_of(["a.jpg", "a.png"], "keys/", "out"))) == 2


@pytest.mark.parametrize("key", ["k.veilkey", "a.jpg", "a-anonymized.jpg", "there"])
def test_a_key_never_replaces_anything(key: str) -> None:
    touch("a.jpg", "k.veilkey")
    Path("there/a-anonymized.jpg.veilkey").mkdir(parents=True)
    with pytest.raises(UsageError):
        keys_of(["a.jpg"], key)


@pytest.mark.parametrize(("output", "variants"), [(None, 1), ("out", 1), ("out", 3), (None, 3)])
def test_a_folder_of_keys_is_found_again(output: str | None, variants: int) -> None:
    touch("in/sub/a.jpg", "in/sub/b.jpg")
    arguments = ["in"] if output else ["in/sub/a.jpg", "in/sub/b.jpg"]
    jobs = plan_jobs(find_photos(arguments), output, tag="anonymized", variants=variants)
    planned = plan_keys(jobs, "keys")
    touch(*(path.as_posix() for job in jobs for path in job.outputs), *map(str, planned))
    written = [path.as_posix() for job in jobs for path in job.outputs]
    photos = find_photos(["out"] if output else written)
    expected = [path for path in planned for _ in range(variants)]
    assert [find_keys("keys", photo) for photo in photos] == [[path] for path in expected]


def test_a_missing_key_is_named() -> None:
    touch("a.jpg")
    Path("keys").mkdir()
    with pytest.raises(UsageError, match=r"a\.jpg\.veilkey"):
        find_keys("keys", Found(Path("a.jpg"), Path("a.jpg"), False))
    with pytest.raises(UsageError, match="no such file"):
        find_keys("none.veilkey", Found(Path("a.jpg"), Path("a.jpg"), False))


def test_the_suffixes_are_those_that_can_be_written() -> None:
    for suffix in READABLE:
        save_photo(_pixel(), Path("x" + suffix))
    with pytest.raises(OptionError):
        save_photo(_pixel(), Path("x.gif"))


def _pixel() -> object:
    import numpy as np

    return np.zeros((1, 1, 3), np.uint8)
