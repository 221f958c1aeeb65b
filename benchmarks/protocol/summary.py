"""The README's table: what counts most, in one place."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks._metrics import Verification, frechet_distance
from benchmarks.protocol.baselines import BASELINES
from benchmarks.protocol.collect import FARS, KINDS
from benchmarks.protocol.judges import GUIDED, Array, Judge
from benchmarks.protocol.people import Portrait
from benchmarks.protocol.perception import without_faces

__all__ = ["OPERATIONS", "as_markdown", "recognition"]

FAR = FARS[0]
OPERATIONS = ("anonymize", "hide", "recover")


def recognition(portraits: list[Portrait], judges: list[Judge]) -> list[dict[str, Any]]:
    """Match rates and feature distances, one row a recognizer that has looked."""
    people = [p.person for p in portraits]
    trips = np.stack([p.outputs["round trip"] for p in portraits])
    return [
        _recognition_row(
            judge.name,
            judge.independent,
            {
                **{op: judge.vectors[op] for op in ("original", *KINDS)},
                **({} if judge.kind == GUIDED else {"round trip": judge.of_crops(trips)}),
                **{
                    name: judge.of_crops(crops)
                    for name, crops in without_faces(portraits, judge.frame, trips.shape[1]).items()
                },
            },
            people,
        )
        for judge in judges
    ]


def _recognition_row(
    name: str, independent: bool, vectors: dict[str, Array], people: list[str]
) -> dict[str, Any]:
    check = Verification(vectors["original"], people)
    halves = np.arange(len(people)) % 2 == 0
    reference = vectors["original"][halves]
    row: dict[str, Any] = {
        "recognizer": name,
        "independent": independent,
        "threshold": check.threshold(FAR),
    }
    for op, probe in vectors.items():
        row[op] = {
            "same_photo": check.same_photo(probe, FAR),
            "other_photos": check.other_photos(probe, FAR),
            "cosine": float((probe * check.original).sum(1).mean()),
            "rank1": check.rank1(probe),
            # The other half of the faces: no photo is compared with itself.
            "frechet": frechet_distance(reference, probe[~halves]),
        }
    return row


def as_markdown(report: dict[str, Any]) -> str:
    """The table that the README shows."""
    fid, per, spd = report["fidelity"], report["perception"], report["speed"]
    lines = [
        f"{report['faces']} faces of {report['people']} people; "
        f"bundle `{report['bundle']}`, preset `{report['preset']}`.",
        "",
        "| operation | figure | measured |",
        "|---|---|---|",
        f"| VAE round trip | PSNR of aligned faces | {fid['round_trip_db']:.2f} dB |",
        f"| recover | PSNR, {fid['recovery_steps']} steps | {fid['recovered_db']:.2f} dB |",
        f"| anonymize | CenterFace still finds a face | {per['anonymize']['detected']:.1%} |",
        f"| hide | CenterFace still finds a face | {per['hide']['detected']:.1%} |",
        f"| hide | SSIM to the original, ArcFace crop | {per['hide']['ssim']:.2f} |",
    ]
    if "ssim_yardsticks" in report:
        marks = report["ssim_yardsticks"]
        lines.append(
            "| for comparison | SSIM with another person's face in its place, or a grey patch "
            f"| {marks['another_person']:.2f}, {marks['grey']:.2f} |"
        )
    for row in report["recognition"]:
        kind = (
            "independent"
            if row["independent"]
            else ("guided against" if row["recognizer"] == "bundle" else "distilled from")
        )
        who = f"{row['recognizer']} ({kind})"
        for op in ("original", *OPERATIONS):
            same = "" if op == "original" else f"same photo {row[op]['same_photo']:.1%}, "
            lines.append(
                f"| {op} | TAR at FAR 1 %, {who} "
                f"| {same}other photos {row[op]['other_photos']:.1%} |"
            )
        if "another_person" in row:
            marks = [
                f"{figure.replace('_', ' ')} "
                + ", ".join(f"{row[mark][figure]:.1%}" for mark in ("another_person", "grey"))
                for figure in ("same_photo", "other_photos")
            ]
            lines.append(
                f"| for comparison | TAR at FAR 1 %, {who}, with another person's face in its "
                f"place, or a grey patch | {'; '.join(marks)} |"
            )
    for row in report["recognition"]:
        if "round trip" in row:
            values = ", ".join(
                f"{op} {row[op]['frechet']:.3f}"
                for op in ("original", "round trip", "anonymize", "hide", *BASELINES)
            )
            lines.append(
                f"| natural | Fréchet distance of {row['recognizer']} features to other real faces "
                f"| {values} |"
            )
    for name, value in spd.items():
        figure = f"{value:.2f}×" if name.endswith("ratio") else _seconds(value)
        lines.append(f"| speed | {name.removesuffix('_s').replace('_', ' ')} | {figure} |")
    return "\n".join(lines) + "\n"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"
