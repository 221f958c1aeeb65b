"""`diffveil build`: its options are there without the exporter, and misuse is told apart."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffveil.cli import build
from diffveil.cli.main import build_parser, main


def test_help_teaches_by_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(r"^  diffveil (.+)$", build.EXAMPLES, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        assert build_parser().parse_args(line.split()).module == "diffveil.cli.build"
    with pytest.raises(SystemExit) as ended:
        main(["build", "--help"])
    assert ended.value.code == 0
    assert "An engine is code" in capsys.readouterr().out


def test_defaults_are_the_documented_ones() -> None:
    args = build_parser().parse_args(["build", "b", "--backend", "tensorrt"])
    assert (args.target, args.batch, args.programs) == (["present"], [1, 4, 8], None)
    assert args.weights == "folded"


def test_without_the_extra_the_install_line_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    assert main(["build", "b", "--backend", "tensorrt-rtx"]) == 1
    assert "pip install 'diffveil[export,tensorrt-rtx]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "1,x"], "expected whole numbers"),
        (["--batch", ""], "expected whole numbers"),
        (["--target", "89,,86"], "expected names with commas"),
        (["--weights", "int4"], "invalid choice"),
        (["--batch", "0"], "expected sizes in 1"),
        (["--programs", "blur"], "'blur' is none of"),
        (["--memory", "0"], "memory: received 0"),
    ],
)
def test_misuse_is_status_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["build", str(tmp_path), "--backend", "tensorrt-rtx", *words])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    assert message in capsys.readouterr().err


def test_no_bundle_is_status_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(tmp_path), "--backend", "tensorrt-rtx"]) == 5
    assert "no bundle at" in capsys.readouterr().err
