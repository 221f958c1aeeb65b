"""Reports as JSON; Markdown tables, and where a document has room for them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["insert", "interval", "number", "percent", "table", "write_json"]


def table(*head: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def number(value: float | None, form: str) -> str:
    """A figure in a format, or a dash where there is none: NaN, in JSON null."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def percent(rate: Mapping[str, float]) -> str:
    """A rate's value, or a dash where nothing was tried."""
    return number(rate["value"], ".1%")


def interval(rate: Mapping[str, float]) -> str:
    """A rate with its 95 % interval."""
    if not rate["trials"]:
        return "–"
    return f"{rate['value']:.1%} ({100 * rate['low']:.1f}…{100 * rate['high']:.1f})"


def insert(document: Path, text: str, name: str = "quality") -> None:
    """Put text between the markers of that name in a Markdown file.

    Raises:
        SystemExit: The document lacks the markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = document.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{document}: expected the markers {begin} and {end}")
    document.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


def write_json(path: Path, report: dict[str, Any]) -> None:
    """A report, whole or not at all; floats to six digits, which is more than they mean."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(_rounded(report), indent=1) + "\n")
    temporary.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value
