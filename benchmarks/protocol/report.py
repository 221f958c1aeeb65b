"""Tables of the quality protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.protocol.groups import SMALL
from benchmarks.protocol.perception import PROXIES
from benchmarks.protocol.tables import interval, number, percent, table

__all__ = ["as_markdown"]

_NAMES = {"anonymize": "anonymized", "hide": "hidden", "recover": "recovered"}


def as_markdown(report: dict[str, Any]) -> str:
    """Every table that the report has, each under a heading that says what it is."""
    lines = [*_head(report), "", *_speed(report), "", *_looks(report), ""]
    sections: dict[str, Callable[[Any], list[str]]] = {
        "verification": _verification,
        "groups": _groups,
        "robustness": _robustness,
        "recovery": _recovery,
        "keys": _keys,
        "diversity": _diversity,
    }
    for name, section in sections.items():
        if name in report["protocol"]:
            lines += [*section(report["protocol"][name]), ""]
    return "\n".join(lines)


def _head(report: dict[str, Any]) -> list[str]:
    rows = report["protocol"]["verification"]
    return [
        f"{report['faces']} faces of {report['people']} people, bundle `{report['bundle']}`, "
        f"preset `{report['preset']}`, backend `{report['backend']}`; gallery of "
        f"{rows[0]['gallery']} originals, {rows[0]['impostor_pairs']} impostor pairs. In brackets "
        "95 % intervals: bootstrap over people, the threshold set anew in each of 1,000 draws; "
        "Wilson's for the number of people where all trials agree. *blur* and *mosaic* are drawn "
        "as `deface` does by default.",
    ]


def _speed(report: dict[str, Any]) -> list[str]:
    names = ("blur", "mosaic", "anonymize", "hide", "recover")
    rows = [(name, f"{1000 * report['speed'][f'{name}_s']:.1f}") for name in names]
    return [
        "**Time of one face**, detection excluded: the baselines win.",
        "",
        *table("operation", "ms", rows=rows),
    ]


def _verification(found: list[dict[str, Any]]) -> list[str]:
    rows = []
    for row in found:
        who = f"{row['recognizer']} ({row['kind']})"
        for kind in ("original", *_NAMES, "blur", "mosaic"):
            rates = row[kind]
            cells = []
            for far in ("0.01", "0.001"):
                same = "" if kind == "original" else interval(rates["at"][far]["same_photo"])
                cells += [same, interval(rates["at"][far]["other_photos"])]
            rows.append(
                (
                    who,
                    _NAMES.get(kind, kind),
                    *cells,
                    interval(rates["rank1"]),
                    f"{rates['cosine']:.2f}",
                )
            )
    return [
        "**Recognition**: share accepted as the person, against the same photo's original and "
        "against other photos of the person; rank-1: the nearest of all other originals is the "
        "person's.",
        "",
        *table(
            "recognizer",
            "photos",
            "FAR 1 %, same photo",
            "FAR 1 %, other photos",
            "FAR 0.1 %, same photo",
            "FAR 0.1 %, other photos",
            "rank-1",
            "cosine",
            rows=rows,
        ),
    ]


def _looks(report: dict[str, Any]) -> list[str]:
    looks = report["perception"]
    rows, changes = [], []
    for kind, row in looks.items():
        name = _NAMES.get(kind, kind)
        changes.append(
            (name, *(number(row["changed"][p], ".1f" if p == "roll" else ".3f") for p in PROXIES))
        )
        if "psnr" in row:
            rows.append(
                (
                    name,
                    f"{row['psnr']:.1f} dB",
                    f"{row['ssim']:.2f}",
                    f"{row['gmsd']:.3f}",
                    f"{row['detected']:.1%}",
                    number(row["landmark_error"], ".3f"),
                    number(row["landmark_error_p90"], ".3f"),
                )
            )
    return [
        "**Likeness to the original** in ArcFace's crop (GMSD: gradient magnitude similarity "
        "deviation, Xue et al. 2014, larger is worse), and what CenterFace still finds; landmark "
        "error in eye distances.",
        "",
        *table(
            "photos",
            "PSNR",
            "SSIM",
            "GMSD",
            "face found",
            "landmark error, mean",
            "90th percentile",
            rows=rows,
        ),
        "",
        "**Pose, expression, gaze: proxies** from five landmarks and the darkness around the eyes, "
        "mean absolute change where a face is found; *another person* is what no tie gives.",
        "",
        *table("photos", *(f"{name}, {unit}" for name, unit in PROXIES.items()), rows=changes),
    ]


def _robustness(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            judge,
            name,
            interval(row["original"]["other_photos"]),
            interval(row["anonymize"]["same_photo"]),
            interval(row["hide"]["same_photo"]),
        )
        for judge, disturbances in found.items()
        for name, row in disturbances.items()
    ]
    head = ("original, other photos", "anonymized, same photo", "hidden, same photo")
    return [
        "**Robustness of protection**: TAR at FAR 1 % after the protected photo was changed.",
        "",
        *table("recognizer", "change", *head, rows=rows),
    ]


def _recovery(found: dict[str, Any]) -> list[str]:
    rows = [
        (name, f"{row['psnr']:.2f} dB", interval(row["same_photo"]))
        for name, row in found["under"].items()
    ]
    return [
        f"**Robustness of recovery**, {found['faces']} faces, judged by {found['judge']}: the face "
        "comes from the key, its rim from the photo. A photo of another size is refused "
        f"({found['refused_of_another_size']:.0%} of trials) until it is scaled or put back.",
        "",
        *table("change", "PSNR to the original", "TAR at FAR 1 %, same photo", rows=rows),
    ]


def _keys(records: list[dict[str, Any]]) -> list[str]:
    names = list(records[0]["rates"])
    rows = [
        (
            record["key_e"],
            record["key_i"],
            f"{record['psnr']:.1f} dB",
            *(
                f"{percent(record['rates'][n]['own'])} / {percent(record['rates'][n]['owner'])}"
                for n in names
            ),
        )
        for record in records
    ]
    return [
        "**Wrong keys**: recovery with halves of another key. A wrong passphrase or identity never "
        "gets so far: the key file does not open. TAR at FAR 1 % as the person in the photo / as "
        "the person next in the list, whose key is *another person's*.",
        "",
        *table("key-E", "key-I", "PSNR", *names, rows=rows),
    ]


def _diversity(part: dict[str, Any]) -> list[str]:
    rows = [
        (
            name,
            *(
                f"{row[k]['cosine']:.2f}, {row[k]['match']:.1%}"
                for k in ("variants", "strangers", "originals")
            ),
        )
        for name, row in part["judges"].items()
    ]
    return [
        f"**Diversity**: {part['variants']} variants of each of {part['faces']} faces, mean cosine "
        f"and share of pairs that match at FAR 1 %; GMSD among variants {part['gmsd']:.3f}.",
        "",
        *table(
            "recognizer",
            "variants of one face",
            "anonymized faces of different people",
            "originals of different people",
            rows=rows,
        ),
    ]


def _groups(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        (
            row["attribute"],
            row["value"] + (" †" if row["small"] else ""),
            f"{row['faces']} / {row['people']}",
            *(interval(row["rates"][k]) for k in _NAMES),
        )
        for row in found
    ]
    return [
        "**Groups**: share of faces that any independent recognizer matches with the same photo "
        "at FAR 1 % (anonymized), that all do (hidden, recovered); Wilson's intervals for the "
        f"number of people. † fewer than {SMALL} faces: says little. *head* is our own, from the "
        "landmarks.",
        "",
        *table("attribute", "group", "faces / people", *_NAMES.values(), rows=rows),
    ]
