"""What the documents say about the repository is true of it."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest

from diffveil.cli.exits import ExitCode
from diffveil.cli.main import build_parser

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (
        action.choices
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(choices)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (document.parent / link).exists()] == []


def test_readme_python_is_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)


@pytest.mark.parametrize("target", ["demo", "test", "quality"])
def test_make_targets_of_the_readme_exist(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_readme_command_lines_parse() -> None:
    lines = re.findall(r"^    diffveil (.+?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        build_parser(line.split()).parse_args(line.split())


@pytest.mark.parametrize("command", ["anonymize", "hide", "recover", "key", "export", "verify"])
def test_help_teaches_by_examples_that_parse(command: str) -> None:
    epilog = commands()[command].epilog
    assert epilog is not None
    lines = re.findall(r"^  diffveil (.+)$", epilog, re.MULTILINE)
    assert lines
    for line in lines:
        build_parser(line.split()).parse_args(line.split())


def test_exit_codes_stand_in_readme_and_help() -> None:
    text = " ".join(README.split())
    for code, words in {
        ExitCode.DONE: "0 done",
        ExitCode.USAGE: "2 usage",
        ExitCode.NO_FACE: "3 no face found",
        ExitCode.WRONG_SECRET: "4 wrong secret",
        ExitCode.BROKEN_FILE: "5 a broken or mismatching file",
        ExitCode.FAILED: "1 anything else",
    }.items():
        assert words.startswith(str(int(code)))
        assert words in text


def test_decision_records_are_numbered_and_complete() -> None:
    records = sorted((ROOT / "docs" / "adr").glob("*.md"))
    for number, record in enumerate(records, start=1):
        text = record.read_text(encoding="utf-8")
        assert record.name.startswith(f"{number:04}-")
        assert text.startswith(f"# {number}. ")
        for heading in ("Summary", "Motivation", "Description", "Alternatives"):
            assert f"\n## {heading}\n" in text, f"{record.name}: {heading}"
