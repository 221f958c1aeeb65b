"""A bundle appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffveil.bundle import MANIFEST_FILE
from diffveil.errors import OptionError
from diffveil_export.bundle_writer import staged_folder


def _write(folder: Path, text: str) -> None:
    (folder / MANIFEST_FILE).write_text(text)


def _fail_midway(target: Path) -> None:
    with staged_folder(target, force=True) as stage:
        _write(stage, "half")
        raise RuntimeError("midway")


def test_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with staged_folder(target) as stage:
        _write(stage, "new")
        assert not target.exists()
    assert (target / MANIFEST_FILE).read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["bundle"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="midway"):
        _fail_midway(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_bundle(tmp_path: Path) -> None:
    target = tmp_path / "b"
    with staged_folder(target) as stage:
        _write(stage, "old")
    with pytest.raises(RuntimeError, match="midway"):
        _fail_midway(target)
    assert (target / MANIFEST_FILE).read_text() == "old"
    with staged_folder(target, force=True) as stage:
        _write(stage, "new")
    assert (target / MANIFEST_FILE).read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_existing_is_refused_without_force(tmp_path: Path) -> None:
    target = tmp_path / "b"
    with staged_folder(target) as stage:
        _write(stage, "old")
    with pytest.raises(OptionError, match="--force"), staged_folder(target):
        raise AssertionError("the block must not run")


def test_what_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "b"

    def race() -> None:
        with staged_folder(target) as stage:
            _write(stage, "slow")
            with staged_folder(target) as other:
                _write(other, "quick")

    with pytest.raises(OptionError, match="--force"):
        race()
    assert (target / MANIFEST_FILE).read_text() == "quick"


def test_force_never_replaces_what_is_no_bundle(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "child.jpg").write_bytes(b"jpeg")
    link = tmp_path / "link"
    link.symlink_to(photos)
    for target in (photos, link, photos / "child.jpg"):
        with pytest.raises(OptionError, match="no bundle"), staged_folder(target, force=True):
            raise AssertionError("the block must not run")
    assert (photos / "child.jpg").read_bytes() == b"jpeg"
