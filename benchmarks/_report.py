"""Results as Markdown tables and charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._laws import Law
from benchmarks._results import Result

__all__ = ["as_markdown", "draw"]

_TITLES = {
    "photo": "Whole photos, a face, beside blur and mosaic",
    "anonymize": "One aligned face, beside the published recipe in PyTorch and a GAN",
    "img2img": "The same networks without guidance, beside optimum-onnx",
    "operation": "Operations of every preset, one aligned face",
    "program": "Programs, a face",
    "correctness": "Held against golden data",
    "hide": "hide, one aligned face",
    "recover": "Inversion and recovery, one aligned face",
    "kernel": "Kernels",
    "process": "Whole processes",
    "scaling": "Growth",
    "leak": "Memory over many calls",
}
"""Headings by the first part of a case's name, in order."""

_RATIO = "time over "

_SHOWN = ("preset", "faces", "photos", "size", "calls", "evaluations")
"""Fields of a configuration that stand in tables."""


def as_markdown(results: Sequence[Result]) -> str:
    """Tables: first where others are faster, then everything by group."""
    if not results:
        return "No results.\n"
    lines = [*_facts(results), *_losses(results)]
    groups = {name: [r for r in results if _group(r) == name] for name in _TITLES}
    groups |= {name: [r for r in results if _group(r) == name] for name in map(_group, results)}
    for name, rows in groups.items():
        if rows:
            lines += ["", f"### {_TITLES.get(name, name)}", "", *_table(rows)]
            lines += _excluded(rows)
    return "\n".join(lines) + "\n"


def _group(result: Result) -> str:
    return result.case.partition("/")[0]


def _facts(results: Iterable[Result]) -> list[str]:
    """Where, with what and how every run measured."""
    lines = []
    for r in {r.run: r for r in results}.values():
        machine, config = r.hardware, r.config
        packages = ", ".join(f"{name} {number}" for name, number in r.versions.items())
        lines.append(
            f"- {r.run}, commit {r.commit or 'unknown'}, bundle {config.get('bundle')}, "
            f"`{config.get('command', '')}`: "
            f"{_gpu(machine)}{machine.get('processor')} ({machine.get('architecture')}), "
            f"{machine.get('cpus')} CPUs, {config.get('threads')} threads, "
            f"{machine.get('memory_gib')} GiB, load {config.get('load')} before; {packages}"
        )
    return [
        *lines,
        "",
        "Medians, 20th to 80th percentile, n measurements; × is the median ratio to ours (the row "
        "with × 1) within a turn.",
    ]


def _gpu(machine: Mapping[str, Any]) -> str:
    return f"{machine['gpu']}, driver {machine.get('driver')}, " if machine.get("gpu") else ""


def _losses(results: Iterable[Result]) -> list[str]:
    """Who is faster than ours, first."""
    rows = [
        f"- {r.provider}, {r.case}: takes {_number(r.p50)} of the time"
        for r in results
        if r.metric.startswith("time over diffveil")
        and "diffveil" not in r.provider
        and r.p50 is not None
        and r.p50 < 1
    ]
    return ["", "Faster than ours:", "", *rows] if rows else []


def _table(rows: Sequence[Result]) -> list[str]:
    times = {(r.case, r.provider): r for r in rows if r.metric.startswith(_RATIO)}
    bases = {(r.case, r.metric.removeprefix(_RATIO)) for r in times.values()}
    lines = [
        "| case | provider | with | figure | p50 | p20 … p80 | × | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        who = r.case, r.provider
        if who in times and r is times[who] and any(_is_time(o, who) for o in rows):
            continue  # stands beside the time
        ratio = ""
        if _is_time(r, who):
            ratio = _number(times[who].p50) if who in times else "1" * (who in bases)
        shown = ", ".join(f"{k} {r.config[k]}" for k in _SHOWN if k in r.config)
        name = r.case.partition("/")[2] or r.case
        figure, value, spread = _figures(r)
        cells = [name, r.provider, shown, figure, value, spread, ratio, str(r.count or "")]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return lines


def _is_time(result: Result, who: tuple[str, str]) -> bool:
    return (result.case, result.provider) == who and result.metric.startswith("time a ")


def _figures(r: Result) -> tuple[str, str, str]:
    """What was measured, its median and its spread, as texts."""
    if r.not_run:
        return f"not run: {r.not_run}", "", ""
    spread = f"{_number(r.p20)} … {_number(r.p80)}" if r.count > 1 else ""
    if "p90" in r.config and r.metric.startswith("time"):
        spread += f", p90 {_number(r.config['p90'])}"
    if r.unit == "exponent":
        return f"{r.metric}: {r.config.get('law', '')}", f"power {_number(r.p50)}", spread
    return r.metric, f"{_number(r.p50)} {r.unit}", spread


def _excluded(rows: Iterable[Result]) -> list[str]:
    notes = dict.fromkeys(
        f"{kind}: {r.config[key]}"
        for r in rows
        for key, kind in (
            ("excluded", "Not in these figures"),
            ("includes", "In these figures"),
            ("unlike", "Not alike"),
            ("counted", "Faces"),
        )
        if key in r.config
    )
    return ["", *(f"{note}.  " for note in notes)] if notes else []


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def draw(results: Sequence[Result], folder: Path, bars: str = "bench.png") -> list[Path]:
    """Write `bars` (milliseconds a face) and `scaling.png`; returns what was written."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for name, picture in ((bars, _bars), ("scaling.png", _growth)):
        figure = picture(results)
        if figure is not None:
            figure.savefig(folder / name, dpi=110)
            written.append(folder / name)
    return written


def _bars(results: Iterable[Result]) -> Any:
    from matplotlib.figure import Figure

    rows = {
        f"{r.provider} ({r.case.partition('/')[2]})": r
        for r in results
        if r.metric == "time a face" and _group(r) in ("anonymize", "photo", "img2img")
    }
    if not rows:
        return None
    ordered = sorted(rows.items(), key=lambda item: item[1].p50 or 0.0)
    figure = Figure(figsize=(10, 0.35 * len(ordered) + 1.2), layout="constrained")
    axis = figure.subplots()
    middle = np.array([r.p50 for _, r in ordered], np.float64)
    low, high = (np.array([getattr(r, p) for _, r in ordered], np.float64) for p in ("p20", "p80"))
    colours = ["tab:blue" if label.startswith("diffveil") else "tab:grey" for label, _ in ordered]
    bars = axis.barh([label for label, _ in ordered], middle, color=colours)
    axis.errorbar(
        middle, range(len(ordered)), xerr=(middle - low, high - middle), fmt="none", color="black"
    )
    axis.bar_label(bars, [_number(value) for value in middle], padding=6)
    axis.set(xscale="log", xlabel="milliseconds a face (bars 20th to 80th percentile)")
    axis.set_xlim(right=4 * float(high.max()))
    axis.margins(y=0.01)
    axis.invert_yaxis()
    return figure


def _growth(results: Sequence[Result]) -> Any:
    from matplotlib.figure import Figure

    rows = [r for r in results if _group(r) == "scaling" and r.unit != "exponent"]
    axes = list(dict.fromkeys(r.case for r in rows))
    metrics = [m for m in ("time", "peak memory") if any(r.metric == m for r in rows)]
    if not rows:
        return None
    figure = Figure(figsize=(4 * len(axes), 3.4 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), len(axes), squeeze=False)
    for column, case in enumerate(axes):
        for line, metric in enumerate(metrics):
            points = [r for r in rows if r.case == case and r.metric == metric]
            _draw_growth(grid[line][column], points, _law(results, case, metric))
            grid[line][column].set(xlabel=case.partition("/")[2])
    return figure


def _law(results: Iterable[Result], case: str, metric: str) -> Law | None:
    for r in results:
        if r.case == case and r.metric == f"law of {metric}":
            c = r.config
            return Law(c["kind"], c["first"], c["second"], c["residual"], ())
    return None


def _draw_growth(axis: Any, points: Sequence[Result], law: Law | None) -> None:
    if not points:
        axis.set_visible(False)
        return
    x = np.array([r.config["size"] for r in points], np.float64)
    y = np.array([r.p50 for r in points], np.float64)
    axis.plot(x, y, "o")
    if law is not None:
        dense = np.geomspace(x.min(), x.max(), 50)
        axis.plot(dense, law(dense), "-", color="grey", label=str(law))
        axis.legend(fontsize=8)
    axis.set(xscale="log", ylabel=f"{points[0].metric}, {points[0].unit}", xticks=x)
    if points[0].metric == "time":
        axis.set(yscale="log", yticks=y, yticklabels=[_number(value) for value in y])
    else:  # from zero: growth by a tenth shall look like a tenth
        axis.set_ylim(0.0, 1.25 * float(y.max()))
    axis.minorticks_off()
    axis.set_xticklabels([f"{value:g}" for value in x])
