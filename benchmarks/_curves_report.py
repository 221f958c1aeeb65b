"""Tables and picture of a curves report, and how it judges a point."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from benchmarks.protocol.tables import table

__all__ = ["Operation", "as_markdown", "draw", "worst"]

Operation = Literal["anonymize", "hide"]


def worst(record: dict[str, Any], operation: Operation) -> float:
    """The rate that counts: for anonymize the highest, for hide the lowest independent one."""
    rows = [r for r in record.values() if r["independent"]] or list(record.values())
    if operation == "anonymize":
        return max(float(max(r["same_photo"], r["other_photos"])) for r in rows)
    return min(float(r["same_photo"]) for r in rows)


def as_markdown(report: dict[str, Any]) -> str:
    """Presets, sweep, recovery, refinement and the halves of the key, as tables."""
    tables = (_presets, _sweep, _recovery, _refinement, _keys)
    return "\n".join(line for part in tables for line in (*part(report), ""))


def _presets(report: dict[str, Any]) -> list[str]:
    paper, ratios = (report["paper_in_pytorch"][k] for k in ("milliseconds", "ratios"))
    rows = []
    for p in report["points"]:
        if p["family"] != "presets":
            continue
        name = p["name"].removeprefix("preset ")
        mine = ratios[name].values() if p["operation"] == "anonymize" else ()
        cells = [f"{ratio:.1f}" for ratio in mine] or ["", ""]
        ms, rate = f"{p['milliseconds']:.0f}", f"{p['worst']:.1%}"
        rows.append((p["operation"], name, str(p["evaluations"]), ms, *cells, rate))
    return [
        f"{report['faces']} faces of people that no training saw, bundle `{report['bundle']}`, "
        f"backend `{report['backend']}`. The published anonymization of one face in plain PyTorch, "
        f"in turns with ours in one process: {paper['one variant']:.0f} ms for one variant, "
        f"{paper['as released']:.0f} ms as released (four variants and their key). TAR at FAR 1 % "
        "of the worst independent recognizer.",
        "",
        *table(
            "operation",
            "preset",
            "UNet evaluations",
            "ms a face",
            "× PyTorch, one variant",
            "× as released",
            "TAR",
            rows=rows,
        ),
    ]


def _sweep(report: dict[str, Any]) -> list[str]:
    points = [p for p in report["points"] if p["family"] != "presets"]
    rows = [
        (
            p["name"],
            p["operation"],
            str(p["faces"]),
            f"{p['milliseconds']:.0f}",
            f"{p['worst']:.1%}",
        )
        for p in points
    ]
    return [
        f"hide above: {report['sweep_faces']} faces. One thing changed about `fast`:",
        "",
        *table("sampler, guidance or spacing", "operation", "faces", "ms a face", "TAR", rows=rows),
    ]


def _recovery(report: dict[str, Any]) -> list[str]:
    rows = [
        # + 0.0: no "-0.000"
        (
            f"{r['sampler']}, {r['steps']} steps",
            str(r["evaluations"]),
            f"{round(r['loss_db'], 3) + 0.0:.3f}",
        )
        for r in report["recovery"]
        if "loss_db" in r
    ]
    return table("recovery", "UNet evaluations", "dB lost to the VAE round trip", rows=rows)


def _refinement(report: dict[str, Any]) -> list[str]:
    rows = [
        (str(r["steps"]), f"{r['psnr']:.2f} dB", f"{r['milliseconds']:.0f}")
        for r in report["refinement"]
    ]
    head = ("gradient steps on the latent before inversion", "PSNR", "ms a face")
    return table(*head, rows=rows)


def _keys(report: dict[str, Any]) -> list[str]:
    names = [n for n in report["keys"][0] if n not in ("key_e", "key_i", "psnr")]
    rows = [
        (k["key_e"], k["key_i"], f"{k['psnr']:.2f} dB", *(f"{k[n]:.1%}" for n in names))
        for k in report["keys"]
    ]
    return table("key-E", "key-I", "PSNR", *(f"TAR {n}" for n in names), rows=rows)


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a picture of three panels: anonymize, hide, recover."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(18, 5.5), constrained_layout=True)
    titles = {
        "anonymize": "anonymize: TAR at FAR 1 % (lower protects more)",
        "hide": "hide: TAR at FAR 1 % (higher is still recognised)",
    }
    for axis, (operation, title) in zip(axes, titles.items(), strict=False):
        points = [p for p in report["points"] if p["operation"] == operation]
        _draw_protection(axis, points)
        axis.set_title(title)
    _draw_recovery(axes[2], report["recovery"])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_protection(axis: Any, points: list[dict[str, Any]]) -> None:
    families: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        families.setdefault(point["family"], []).append(point)
    for family, members in families.items():
        ordered = sorted(members, key=lambda p: p["milliseconds"])
        x = [p["milliseconds"] for p in ordered]
        y = [100 * p["worst"] for p in ordered]
        alone = family in ("presets", "guidance", "spacing")
        axis.plot(
            x,
            y,
            marker="*" if family == "presets" else "o",
            markersize=13 if family == "presets" else 5,
            linestyle="none" if alone else "-",
            label=family,
        )
        if alone:
            _label(axis, x, y, [p["name"].removeprefix("preset ") for p in ordered])
    axis.set(xlabel="milliseconds a face", ylabel="%", xscale="log")
    axis.set_xticks([100, 200, 500, 1000, 2000, 5000], minor=False)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.xaxis.set_minor_formatter("")
    axis.legend(fontsize=8)


def _label(axis: Any, x: list[float], y: list[float], names: list[str]) -> None:
    for left, height, name in zip(x, y, names, strict=True):
        axis.annotate(
            name,
            (left, height),
            fontsize=7,
            rotation=35,
            xytext=(3, 3),
            textcoords="offset points",
        )


def _draw_recovery(axis: Any, records: list[dict[str, Any]]) -> None:
    for sampler in ("o-belm", "bdia", "ddim"):
        points = [r for r in records if r["sampler"] == sampler]
        axis.plot(
            [p["evaluations"] for p in points],
            [max(p["loss_db"], 1e-4) for p in points],
            marker="o",
            label=sampler,
        )
    axis.set(
        title="recover: dB lost to the VAE round trip", xlabel="UNet evaluations", yscale="log"
    )
    axis.axhline(0.1, color="grey", linestyle=":")
    axis.legend()
