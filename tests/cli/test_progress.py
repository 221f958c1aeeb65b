"""The bar is drawn on terminals only, and leaves no trace in the lines of results."""

from __future__ import annotations

import io
import sys

import pytest

from diffveil.cli.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("work", io.StringIO()) as bar:
        bar(1, 2)
        bar.message("done", sys.stdout)
        bar(2, 2)
    captured = capsys.readouterr()
    assert captured.out == "done\n"
    assert captured.err == ""


def test_draws_and_wipes() -> None:
    stream = Terminal()
    with ProgressBar("work", stream) as bar:
        bar(0, 4)
        bar(4, 4)
    drawn = stream.getvalue().split("\r")
    assert any("work [" in line and "100%" in line for line in drawn)
    assert drawn[-1] == ""
    assert drawn[-2].strip() == ""
    assert len(drawn[-2]) >= max(len(line) for line in drawn)


@pytest.mark.parametrize(("done", "total"), [(0, 0), (5, 4), (-1, 4)])
def test_odd_counts_do_not_stop_the_work(done: int, total: int) -> None:
    ProgressBar("work", Terminal())(done, total)
