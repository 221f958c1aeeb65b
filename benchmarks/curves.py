"""Quality against milliseconds of every sampler and way of guidance: what presets are picked from.

    python -m benchmarks.curves PEOPLE --recognizer NAME=FILE… [--independent NAME=FILE…]

PEOPLE holds `person/photo.jpg`. For each choice one run over all faces gives the true accept rate
of anonymized or hidden faces (threshold at FAR 1 % of the originals' impostor pairs; the worst of
the independent recognizers counts) and calls of one face give its model time: everything from the
aligned crop to the protected crop, detection and files excluded. The published recipe runs in plain
PyTorch in the same process, so every speed-up is a ratio within one run.

Writes `curves.json` and `curves.png` to `--out`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import diffveil
from benchmarks._metrics import Verification, frechet_distance, psnr
from benchmarks._oracle import paper_seconds
from benchmarks._recognizers import ARCFACE_TEMPLATE, load_recognizer
from benchmarks._refine import refinement
from benchmarks.quality import FAR, Pixels, insert, load_people, named_files
from diffveil.align import crop_face, similarity
from diffveil.bundle import Bundle
from diffveil.detectors import CenterFace
from diffveil.noise import NoiseKey
from diffveil.plans import Inversion, Plan
from diffveil.presets import PRESETS
from diffveil.scenes import to_images, to_pixels

Operation = Literal["anonymize", "hide"]
_OPERATIONS: tuple[Operation, ...] = ("anonymize", "hide")
_BATCH = 8
_REPEATS = 3


@dataclass(frozen=True)
class Choice:
    """One point: a plan, and the family whose curve it lies on."""

    name: str
    family: str
    operation: Operation
    plan: Plan


_SAMPLERS = ("ddim", "dpm++2m", "lcm", "tcd")


def choices(brief: bool, has_few: bool = True) -> Iterator[Choice]:
    """Presets first, then one thing varied at a time about the default preset.

    Args:
        brief: Only the presets.
        has_few: Whether the bundle has `denoise_few`: no distilled sampler without.
    """
    for name, preset in PRESETS.items():
        for operation in _OPERATIONS:
            yield Choice(f"preset {name}", "presets", operation, getattr(preset, operation))
    if brief:
        return
    for operation in _OPERATIONS:
        fast: Plan = getattr(PRESETS["fast"], operation)
        base = fast.fitting(has_few)
        for sampler in _SAMPLERS:
            distilled = sampler in ("lcm", "tcd")
            if distilled and not has_few:
                continue
            # The same starting noise and guidance for all: only sampler and model differ.
            start = replace(base, distilled=distilled, otherwise=None)
            for evaluations in (2, 3, 4, 8):
                steps = round(evaluations / start.strength)
                plan = replace(start, sampler=sampler, steps=steps)
                yield Choice(f"{sampler} {evaluations}", sampler, operation, plan)
        for spacing in ("karras", "ays"):
            yield Choice(spacing, "spacing", operation, replace(base, spacing=spacing))
        guided = base.guidance
        once = replace(guided, through="pixels", repeats=1)
        ways = {
            "full gradient": once,
            "full gradient ×2": replace(once, repeats=2),
            "latent": replace(guided, through="latent", repeats=1),
            "latent ×4": replace(guided, through="latent", repeats=4),
            "full, every 2nd": replace(once, every=2),
            "full, every 2nd reused": replace(once, every=2, reuse=True),
            "full, below 500": replace(once, window=(0, 500)),
            "none": replace(guided, weight=((-1, 0.0),)),
        }
        for name, guidance in ways.items():
            yield Choice(name, "guidance", operation, replace(base, guidance=guidance))


class Bench:
    """Faces, recognizers and the operations on them.

    Args:
        protector: What is measured.
        crops: Aligned faces of the bundle's framing, uint8 [N, S, S, 3].
        people: Person of each.
        recognizers: Files by name.
        independent: Names of those that had no part in the bundle's training.
    """

    def __init__(
        self,
        protector: diffveil.Protector,
        crops: Pixels,
        people: list[str],
        recognizers: dict[str, Path],
        independent: set[str],
    ) -> None:
        self.operations, self.crops = protector.operations, crops
        self.images = to_images(crops)
        template = np.asarray(protector.bundle.template)
        self._to_arcface = similarity(template, ARCFACE_TEMPLATE)
        self._embed = {name: load_recognizer(path) for name, path in recognizers.items()}
        self.independent = independent
        original = self._vectors(crops)
        self._people = people
        self._checks = {name: Verification(v, people) for name, v in original.items()}

    def _vectors(self, crops: Pixels) -> dict[str, NDArray[np.float32]]:
        framed = np.stack([crop_face(crop, self._to_arcface, 112) for crop in crops])
        return {name: embed(framed) for name, embed in self._embed.items()}

    def _run(self, operation: Operation, plan: Plan, rows: slice) -> NDArray[np.float32]:
        images = self.images[rows]
        keys = [NoiseKey.from_seed(i) for i in range(*rows.indices(len(self.images)))]
        call = getattr(self.operations, operation)
        result: NDArray[np.float32] = call(images, plan, keys=keys)[:, 0]
        return result

    def protection(self, choice: Choice, faces: int) -> dict[str, Any]:
        """Match rates of the first `faces` faces under one choice."""
        faces = min(faces, len(self.images))
        parts = [
            self._run(choice.operation, choice.plan, slice(i, min(i + _BATCH, faces)))
            for i in range(0, faces, _BATCH)
        ]
        record: dict[str, Any] = {}
        for name, probe in self._vectors(to_pixels(np.concatenate(parts))).items():
            check = self._checks[name].first(faces)
            record[name] = {
                "independent": name in self.independent,
                "same_photo": check.same_photo(probe, FAR),
                "other_photos": check.other_photos(probe, FAR),
                "cosine": float((probe * check.original).sum(1).mean()),
                "frechet": frechet_distance(check.original[::2], probe[1::2]),
            }
        return record

    def milliseconds(self, choice: Choice) -> float:
        """Median time of one face, programs loaded and warm."""
        times = []
        for turn in range(_REPEATS + 1):
            started = time.perf_counter()
            self._run(choice.operation, choice.plan, slice(turn % len(self.images), None, 10**6))
            times.append(time.perf_counter() - started)
        return 1000 * float(np.median(times[1:]))

    def beside_the_oracle(self, bundle: Bundle, turns: int = 3) -> dict[str, Any]:
        """How many times faster every preset anonymizes than the published recipe in PyTorch.

        Both run in turns; each turn gives a ratio, the median of them counts.
        """
        rows = []
        for _ in range(turns):
            one, released = paper_seconds(bundle, self.crops[0])
            row = {"one variant": 1000 * one, "as released": 1000 * released}
            for name, preset in PRESETS.items():
                row[name] = self.milliseconds(
                    Choice(name, "presets", "anonymize", preset.anonymize)
                )
            rows.append(row)
        medians = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
        ratios = {
            name: {
                whole: float(np.median([row[whole] / row[name] for row in rows]))
                for whole in ("one variant", "as released")
            }
            for name in PRESETS
        }
        return {"milliseconds": medians, "ratios": ratios, "turns": turns}

    def recovery(self, count: int) -> list[dict[str, Any]]:
        """Recovered PSNR under every inversion, beside the autoencoder's round trip."""
        faces = [
            self.operations.prepare(self.images[i : min(i + _BATCH, count)])
            for i in range(0, min(count, len(self.images)), _BATCH)
        ]
        decode = self.operations.programs.decode
        trip = [to_pixels(np.clip(decode(latent=f.latents), -1, 1)) for f in faces]
        ceiling = self._psnr(np.concatenate(trip))
        records = []
        for sampler in ("o-belm", "bdia", "ddim"):
            for steps in (2, 4, 6, 8, 10, 20, 50):
                if sampler != "ddim" and steps > 20:
                    continue
                inversion = Inversion(sampler, steps)
                out = [
                    to_pixels(
                        self.operations.recover(*self.operations.invert(f, inversion), inversion)
                    )
                    for f in faces
                ]
                table = inversion.recovery(self.operations.schedule)
                records.append(
                    {
                        "sampler": sampler,
                        "steps": steps,
                        "evaluations": len(table.steps),
                        "loss_db": ceiling - self._psnr(np.concatenate(out)),
                    }
                )
        return [{"sampler": "round trip", "psnr": ceiling}, *records]

    def keys(self) -> list[dict[str, Any]]:
        """What each half of the recovery key contributes: each right, or another person's."""
        other = strangers(self._people)
        inversion = PRESETS["balanced"].recovery
        tokens, latents = self.operations.invert(self.images, inversion)
        records = []
        for wrong_e in (False, True):
            for wrong_i in (False, True):
                e = tokens[other] if wrong_e else tokens
                i = latents[other] if wrong_i else latents
                out = to_pixels(self.operations.recover(e, i, inversion))
                vectors = self._vectors(out)
                records.append(
                    {
                        "key_e": "another person's" if wrong_e else "right",
                        "key_i": "another person's" if wrong_i else "right",
                        "psnr": self._psnr(out),
                        **{
                            name: self._checks[name].same_photo(v, FAR)
                            for name, v in vectors.items()
                        },
                    }
                )
        return records

    def _psnr(self, out: Pixels) -> float:
        return float(np.mean([psnr(a, b) for a, b in zip(out, self.crops, strict=False)]))


def strangers(people: list[str]) -> NDArray[np.intp]:
    """For each face a face of another person, [N]: the next one in the list, round its end."""
    count = len(people)
    return np.array(
        [
            next(j % count for j in range(i + 1, i + count) if people[j % count] != person)
            for i, person in enumerate(people)
        ]
    )


def worst(record: dict[str, Any], operation: Operation) -> float:
    """The rate that counts: for anonymize the highest, for hide the lowest independent one."""
    rows = [r for r in record.values() if r["independent"]] or list(record.values())
    if operation == "anonymize":
        return max(max(r["same_photo"], r["other_photos"]) for r in rows)
    return min(r["same_photo"] for r in rows)


def as_markdown(report: dict[str, Any]) -> str:
    """Presets, recovery and the halves of the key, as tables."""
    paper, ratios = (report["paper_in_pytorch"][k] for k in ("milliseconds", "ratios"))
    lines = [
        f"{report['faces']} faces of people that no training saw, bundle `{report['bundle']}`, "
        f"backend `{report['backend']}`. The published anonymization of one face in plain PyTorch, "
        f"in turns with ours in one process: {paper['one variant']:.0f} ms for one variant, "
        f"{paper['as released']:.0f} ms as released (four variants and their key). TAR at FAR 1 % "
        "of the worst independent recognizer.",
        "",
        "| operation | preset | UNet evaluations | ms a face | × PyTorch, one variant | × as "
        "released | TAR |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in report["points"]:
        if p["family"] != "presets":
            continue
        name = p["name"].removeprefix("preset ")
        mine = ratios[name] if p["operation"] == "anonymize" else {}
        cells = [f"{ratio:.1f}" for ratio in mine.values()] or ["", ""]
        lines.append(
            f"| {p['operation']} | {name} | {p['evaluations']} | {p['milliseconds']:.0f} "
            f"| {cells[0]} | {cells[1]} | {p['worst']:.1%} |"
        )
    sweep = report["sweep_faces"]
    lines += [
        "",
        f"One thing changed about `fast`, {sweep} faces each, as for hide above:",
        "",
        "| sampler, guidance or spacing | operation | ms a face | TAR |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {p['name']} | {p['operation']} | {p['milliseconds']:.0f} | {p['worst']:.1%} |"
        for p in report["points"]
        if p["family"] != "presets"
    ]
    lines += [
        "",
        "| recovery | UNet evaluations | dB lost to the VAE round trip |",
        "|---|---|---|",
    ]
    lines += [
        f"| {r['sampler']}, {r['steps']} steps | {r['evaluations']} "
        f"| {round(r['loss_db'], 3) + 0.0:.3f} |"  # + 0.0: no "-0.000"
        for r in report["recovery"]
        if "loss_db" in r
    ]
    lines += ["", "| gradient steps on the latent before inversion | PSNR | ms a face |"]
    lines += ["|---|---|---|"]
    lines += [
        f"| {r['steps']} | {r['psnr']:.2f} dB | {r['milliseconds']:.0f} |"
        for r in report["refinement"]
    ]
    names = [n for n in report["keys"][0] if n not in ("key_e", "key_i", "psnr")]
    head = " | ".join(f"TAR {n}" for n in names)
    lines += ["", f"| key-E | key-I | PSNR | {head} |", "|---|---|---|" + "---|" * len(names)]
    lines += [
        f"| {k['key_e']} | {k['key_i']} | {k['psnr']:.2f} dB | "
        + " | ".join(f"{k[n]:.1%}" for n in names)
        + " |"
        for k in report["keys"]
    ]
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Three panels: anonymize, hide, recover."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(18, 5.5), constrained_layout=True)
    titles = {
        "anonymize": "anonymize: TAR at FAR 1 % (lower protects more)",
        "hide": "hide: TAR at FAR 1 % (higher is still recognised)",
    }
    for axis, (operation, title) in zip(axes, titles.items(), strict=False):
        families: dict[str, list[dict[str, Any]]] = {}
        for point in report["points"]:
            if point["operation"] == operation:
                families.setdefault(point["family"], []).append(point)
        for family, points in families.items():
            ordered = sorted(points, key=lambda p: p["milliseconds"])
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
                for a, b, p in zip(x, y, ordered, strict=True):
                    axis.annotate(
                        p["name"].removeprefix("preset "),
                        (a, b),
                        fontsize=7,
                        rotation=35,
                        xytext=(3, 3),
                        textcoords="offset points",
                    )
        axis.set(title=title, xlabel="milliseconds a face", ylabel="%", xscale="log")
        axis.set_xticks([100, 200, 500, 1000, 2000, 5000], minor=False)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_formatter("")
        axis.legend(fontsize=8)
    for sampler in ("o-belm", "bdia", "ddim"):
        points = [r for r in report["recovery"] if r["sampler"] == sampler]
        axes[2].plot(
            [p["evaluations"] for p in points],
            [max(p["loss_db"], 1e-4) for p in points],
            marker="o",
            label=sampler,
        )
    axes[2].set(
        title="recover: dB lost to the VAE round trip", xlabel="UNet evaluations", yscale="log"
    )
    axes[2].axhline(0.1, color="grey", linestyle=":")
    axes[2].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("people", type=Path, metavar="PEOPLE")
    parser.add_argument("--recognizer", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--independent", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--max-people", type=int, default=40)
    parser.add_argument("--photos", type=int, default=2, help="at most so many of each person")
    parser.add_argument(
        "--sweep-faces",
        type=int,
        default=40,
        help="faces that recovery is judged on, and every choice but the presets of anonymize "
        "(default: %(default)s)",
    )
    parser.add_argument("--presets-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("curves"))
    parser.add_argument("--document", type=Path, help="Markdown file whose tables to replace")
    args = parser.parse_args(argv)

    named = named_files([*args.recognizer, *args.independent])
    if not named:
        parser.error("give at least one --recognizer or --independent")
    independent = set(named_files(args.independent))
    protector = diffveil.Protector.load(args.bundle)
    size, template = protector.bundle.image_size, np.asarray(protector.bundle.template)
    portraits, _ = load_people(args.people, args.max_people, args.photos, CenterFace.load())
    if len({p.person for p in portraits}) < 2:
        parser.error(f"{args.people}: expected person/photo.jpg of at least two people")
    crops = np.stack([p.crop("original", template, size) for p in portraits])
    bench = Bench(protector, crops, [p.person for p in portraits], named, independent)

    schedule = protector.operations.schedule
    report: dict[str, Any] = {
        "faces": len(crops),
        "sweep_faces": args.sweep_faces,
        "bundle": protector.bundle.name,
        "fingerprint": protector.bundle.fingerprint,
        "backend": protector.backend,
        "machine": platform.machine(),
        "far": FAR,
        "paper_in_pytorch": bench.beside_the_oracle(protector.bundle),
        "points": [],
    }
    has_few = protector.programs.can("denoise_few")
    for choice in choices(args.presets_only, has_few):
        # One face in a hundred matters for anonymize, and the published hide takes minutes.
        thorough = choice.family == "presets" and choice.operation == "anonymize"
        faces = len(crops) if thorough else args.sweep_faces
        record = bench.protection(choice, faces)
        ms = bench.milliseconds(choice)
        guidance = choice.plan.guidance
        point = {
            "name": choice.name,
            "family": choice.family,
            "operation": choice.operation,
            "faces": min(faces, len(crops)),
            "milliseconds": ms,
            "worst": worst(record, choice.operation),
            "evaluations": len(choice.plan.fitting(has_few).table(schedule).steps),
            "guidance": f"{guidance.through} ×{guidance.repeats}",
            "recognizers": record,
        }
        report["points"].append(point)
        print(
            f"{choice.operation:<10}{choice.name:<26}{ms:8.0f} ms  TAR {point['worst']:.1%}",
            file=sys.stderr,
            flush=True,
        )
    report["recovery"] = bench.recovery(args.sweep_faces)
    report["refinement"] = refinement(protector.bundle, crops[:8])
    report["keys"] = bench.keys()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "curves.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, args.out / "curves.png")
    if args.document:
        insert(args.document, as_markdown(report), "curves")
    print(as_markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
