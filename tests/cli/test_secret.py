"""Passphrases come from a prompt or a file, exactly as given, and are never shown."""

from __future__ import annotations

import getpass
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffveil.cli.exits import UsageError
from diffveil.cli.secret import ask_passphrase, passphrase_from_file

SECRET = "zebra quartz ümlaut"


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A terminal at which somebody types the given answers."""

    def answer(*answers: str) -> None:
        queue = list(answers)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(getpass, "getpass", lambda text: queue.pop(0))

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return answer


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_the_line_ending_is_not_part_of_it(tmp_path: Path, ending: str) -> None:
    file = tmp_path / "pass.txt"
    file.write_bytes((SECRET + ending).encode())
    assert passphrase_from_file(str(file)) == SECRET


def test_spaces_are_part_of_it(tmp_path: Path) -> None:
    file = tmp_path / "pass.txt"
    file.write_text(f" {SECRET} \n", encoding="utf-8")
    assert passphrase_from_file(str(file)) == f" {SECRET} "


@pytest.mark.parametrize(
    "content", [b"", b"\n", SECRET.encode() + b"\nmore", b"\xff" + SECRET.encode(), b"x" * 70_000]
)
def test_a_file_that_is_no_passphrase_is_refused_unseen(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "pass.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        passphrase_from_file(str(file))
    assert "zebra" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("path", ["none.txt", SECRET, "x" * 5000, "x\0"])
def test_a_missing_file_is_not_named_for_it_may_be_the_passphrase(path: str) -> None:
    with pytest.raises(UsageError, match="--passphrase-file: no such file") as caught:
        passphrase_from_file(path)
    assert path not in str(caught.value)


def test_sealing_asks_twice(prompt: Callable[..., None]) -> None:
    prompt(SECRET, SECRET)
    assert ask_passphrase(sealing=True) == SECRET
    prompt(SECRET, "zebra typo")
    with pytest.raises(UsageError, match="differ") as caught:
        ask_passphrase(sealing=True)
    assert "zebra" not in str(caught.value)


def test_opening_asks_once(prompt: Callable[..., None]) -> None:
    prompt(SECRET)
    assert ask_passphrase(sealing=False) == SECRET


def test_nothing_typed(prompt: Callable[..., None]) -> None:
    prompt("")
    with pytest.raises(UsageError, match="empty"):
        ask_passphrase(sealing=False)


@pytest.mark.parametrize(("sealing", "way"), [(True, "--recipient"), (False, "--identity")])
def test_without_a_terminal_the_other_ways_are_named(
    monkeypatch: pytest.MonkeyPatch, sealing: bool, way: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(UsageError, match=way):
        ask_passphrase(sealing=sealing)
