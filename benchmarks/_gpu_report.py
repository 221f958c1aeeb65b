"""The GPU benchmark's results: what of a file is there already, and tables and chart of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks import _report
from benchmarks._results import Result, read

__all__ = ["absent", "beside", "measured", "newest", "render"]


def measured(file: Path, subject: str) -> set[tuple[str, str]]:
    """Case and provider of all that a file has figures or a failure of, for one subject.

    What only lacked a package or a device is not among them: it may be there now.
    """
    if not file.exists():
        return set()
    return {
        (r.case, r.provider)
        for r in read(file)
        if r.config.get("subject") == subject and not r.config.get("absent")
    }


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


def beside(results: Iterable[Result]) -> str:
    """A table of what others' time is, in ours: our fastest backend's at the same batch.

    One row an operation, preset and batch; one column another provider. Medians over medians.
    """
    ours: dict[tuple[str, str, int], Result] = {}
    theirs: dict[tuple[str, str, int], float] = {}
    for r in results:
        if r.metric != "time a face" or not r.p50 or "faces" not in r.config:
            continue
        operation, batch = r.case.partition("/")[0], int(r.config["faces"])
        if not r.provider.startswith("diffveil"):
            theirs[r.provider, operation, batch] = r.p50
        elif "preset" in r.config:
            key = str(r.config["preset"]), operation, batch
            if key not in ours or r.p50 < (ours[key].p50 or 0.0):
                ours[key] = r
    others = list(dict.fromkeys(provider for provider, _, _ in theirs))
    if not ours or not others:
        return ""
    head = ["operation", "preset", "faces", "ours", "ms a face", *others]
    lines = ["### Others' time in ours (above 1: ours is faster)", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (preset, operation, batch), r in ours.items():
        mine = r.p50 or 0.0
        ratios = [theirs.get((who, operation, batch)) for who in others]
        cells = [f"{other / mine:.3g} ×" if other else "" for other in ratios]
        row = [operation, preset, str(batch), r.provider, f"{mine:.4g}", *cells]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def render(file: Path, subject: str, note: str) -> str:
    """Write tables and chart beside a file of results; returns the tables."""
    results = newest(read(file), subject) if file.exists() else []
    text = "\n".join([note, "", *filter(None, [beside(results)]), _report.as_markdown(results)])
    temporary = file.with_name(f".{file.stem}.md.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file.with_suffix(".md"))
    try:
        _report.draw(results, file.parent, f"{file.stem}.png")
    except ImportError:
        text += "\nNo chart: matplotlib is not installed.\n"
    return text
