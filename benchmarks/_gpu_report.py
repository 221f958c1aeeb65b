"""The GPU benchmark's results: what of a file is there already, and tables and chart of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks import _report
from benchmarks._results import Result, read

__all__ = ["absent", "measured", "newest", "render"]


def measured(file: Path, subject: str) -> set[tuple[str, str]]:
    """Case and provider of all that a file has figures or a failure of, for one subject."""
    if not file.exists():
        return set()
    return {(r.case, r.provider) for r in read(file) if r.config.get("subject") == subject}


def newest(results: Iterable[Result], subject: str) -> list[Result]:
    """Of every figure of one subject the one that was measured last, whichever run it was."""
    last = {
        (r.case, r.provider, "" if r.not_run else r.metric): r
        for r in results
        if r.config.get("subject") == subject
    }
    ran = {(r.case, r.provider) for r in last.values() if not r.not_run}
    return [r for r in last.values() if not r.not_run or (r.case, r.provider) not in ran]


def absent(results: Iterable[Result]) -> list[str]:
    """What could not be run and why, a line each."""
    return [f"{r.provider}: {r.case} not run: {r.not_run}" for r in results if r.not_run]


def render(file: Path, subject: str, note: str) -> str:
    """Write tables and chart beside a file of results; returns the tables."""
    results = newest(read(file), subject) if file.exists() else []
    text = f"{note}\n\n{_report.as_markdown(results)}"
    temporary = file.with_name(f".{file.stem}.md.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file.with_suffix(".md"))
    try:
        _report.draw(results, file.parent)
    except ImportError:
        text += "\nNo chart: matplotlib is not installed.\n"
    return text
