"""Results of the GPU benchmark: kept as they come, and shown as tables and a chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["Results", "Row", "as_markdown", "draw"]

Row = dict[str, Any]


class Results:
    """Rows that are written as soon as they are there: whatever ends the run loses none of them.

    Args:
        folder: Where `gpu.json`, `gpu.md` and `gpu.png` are written.
        facts: What was run, where and with which versions.
    """

    def __init__(self, folder: Path, facts: Row) -> None:
        self.folder, self.facts, self.rows = folder, facts, []  # type: Path, Row, list[Row]
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        self._replace("gpu.json", json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")

    def finish(self) -> str:
        """Write tables and chart; returns the tables."""
        text = as_markdown({**self.facts, "rows": self.rows})
        self._replace("gpu.md", text)
        draw(self.rows, self.folder / "gpu.png")
        return text

    def _replace(self, name: str, text: str) -> None:
        temporary = self.folder / f".{name}.new"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.folder / name)


def as_markdown(report: Row) -> str:
    """The report as tables."""
    facts = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
    lines = [
        report["device_note"],
        "",
        f"{report['bundle']}, {report['precision']}, on {report['device']}; {facts}. "
        f"Command: `{report['command']}`.",
    ]
    lines += _table(
        "Correctness",
        [r for r in report["rows"] if r["kind"] == "correctness"],
        {"backend": "backend", "detail": "verdict"},
    )
    lines += _table(
        "Programs",
        [r for r in report["rows"] if r["kind"] == "program"],
        {
            "backend": "backend",
            "name": "program",
            "batch": "batch",
            "p50_ms": "p50 ms",
            "p90_ms": "p90 ms",
            "per_second": "faces/s",
            "tflops": "TFLOP/s",
            "share": "of ceiling",
            "memory": "GiB",
            "error": "error",
        },
    )
    lines += _table(
        "Operations",
        [r for r in report["rows"] if r["kind"] == "operation"],
        {
            "backend": "backend",
            "name": "operation",
            "preset": "preset",
            "batch": "batch",
            "p50_ms": "p50 ms",
            "p90_ms": "p90 ms",
            "ms_a_face": "ms a face",
            "per_second": "faces/s",
            "error": "error",
        },
    )
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], file: Path) -> bool:
    """A bar chart of milliseconds a face; without matplotlib there is none."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["kind"] == "operation" and row["name"] == "anonymize" and "ms_a_face" in row:
            key = row["backend"], row.get("preset") or ""
            best[key] = min(best.get(key, float("inf")), row["ms_a_face"])
    if not best:
        return False
    bars = sorted(best.items(), key=lambda item: item[1])
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(bars) + 1.2), layout="constrained")
    values = [value for _, value in bars]
    drawn = axes.barh([" ".join(key).strip() for key, _ in bars], values)
    axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3)
    axes.set_xscale("log")
    axes.set_xlabel("anonymize: milliseconds a face, best batch")
    axes.invert_yaxis()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return True


def _table(title: str, rows: list[Row], columns: dict[str, str]) -> list[str]:
    if not rows:
        return []
    shown = {k: v for k, v in columns.items() if any(row.get(k) not in (None, "") for row in rows)}
    lines = ["", f"## {title}", "", f"| {' | '.join(shown.values())} |", "|---" * len(shown) + "|"]
    return lines + [f"| {' | '.join(_cell(k, row.get(k)) for k in shown)} |" for row in rows]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "share":
        return f"{100 * value:.0f} %"
    if key == "memory":
        return f"{value / 2**30:.2f}"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")
