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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import diffveil
from benchmarks._curves_report import Operation, as_markdown, draw, worst
from benchmarks._metrics import Verification, frechet_distance, psnr
from benchmarks._oracle import paper_seconds
from benchmarks._recognizers import ARCFACE_TEMPLATE, load_recognizer
from benchmarks._refine import refinement
from benchmarks.protocol.people import Pixels, add_arguments, load_people, named_files, strangers
from benchmarks.protocol.tables import insert
from benchmarks.quality import FAR
from diffveil.align import crop_face, similarity
from diffveil.bundle import Bundle
from diffveil.detectors import CenterFace
from diffveil.noise import NoiseKey
from diffveil.plans import Inversion, Plan
from diffveil.presets import PRESETS
from diffveil.scenes import to_images, to_pixels

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
    guide: str = ""
    """Name of the bundle whose `guide` is asked; empty for the bundle that is measured."""


# Family, sampler, whether it runs the distilled model.
_SAMPLERS: tuple[tuple[str, Literal["ddim", "dpm++2m", "lcm", "tcd"], bool], ...] = (
    ("ddim", "ddim", False),
    ("dpm++2m", "dpm++2m", False),
    ("lcm", "lcm", False),
    ("lcm distilled", "lcm", True),
    ("tcd distilled", "tcd", True),
)


def choices(
    brief: bool,
    has_few: bool = True,
    guides: Iterable[str] = (),
    *,
    has_surrogates: bool = True,
    has_latent: bool = True,
) -> Iterator[Choice]:
    """Presets first, then one thing varied at a time about the default preset.

    Args:
        brief: Only the presets.
        has_few: Whether the bundle has `denoise_few`: no distilled sampler without.
        guides: Names of further bundles whose `guide` to try.
        has_surrogates: Whether the bundle has surrogates.
        has_latent: Whether the bundle has `guide_latent`.
    """
    for name, preset in PRESETS.items():
        for operation in _OPERATIONS:
            yield Choice(f"preset {name}", "presets", operation, getattr(preset, operation))
    if brief:
        return
    for operation in _OPERATIONS:
        fast: Plan = getattr(PRESETS["fast"], operation)
        # One draw each: what a choice does by itself.
        base = replace(fast.fitting(has_few, has_surrogates), redraws=0)
        for family, sampler, distilled in _SAMPLERS:
            if distilled and not has_few:
                continue
            # The same guidance for all: only sampler and model differ.
            start = replace(base, sampler=sampler, distilled=distilled, otherwise=None)
            for evaluations in (2, 4, 8, 12):
                plan = replace(start, steps=round(evaluations / start.strength))
                yield Choice(f"{family} {evaluations}", family, operation, plan)
        for spacing in ("karras", "ays"):
            yield Choice(spacing, "spacing", operation, replace(base, spacing=spacing))
        guided = replace(base.guidance, window=(0, 1000))
        once = replace(guided, through="pixels", repeats=1)
        # Knowing less well where to push, the latent recognizer must push harder and farther.
        latent = replace(guided, through="latent", repeats=1, weight=((-1, 0.12),))
        if guided.mode == "repel":
            latent = replace(latent, margin=-0.2)
        ways = {
            "as the preset": base.guidance,
            "full gradient": once,
            "full gradient ×2": replace(once, repeats=2),
            "latent": latent,
            "latent ×4": replace(latent, repeats=4),
            "full, every 2nd": replace(once, every=2),
            "full, every 2nd reused": replace(once, every=2, reuse=True),
            "full, below 500": replace(once, window=(0, 500)),
            "none": replace(guided, weight=((-1, 0.0),)),
        }
        for name, guidance in ways.items():
            if guidance.through == "latent" and not has_latent:
                continue
            yield Choice(name, "guidance", operation, replace(base, guidance=guidance))
        for guide in guides:
            for repeats in (1, 2):
                plan = replace(base, guidance=replace(once, repeats=repeats))
                name = guide if repeats == 1 else f"{guide} ×{repeats}"
                yield Choice(name, "guidance", operation, plan, guide)


class Bench:
    """Faces, recognizers and the operations on them.

    Args:
        protector: What is measured.
        crops: Aligned faces of the bundle's framing, uint8 [N, S, S, 3].
        people: Person of each.
        recognizers: Files by name.
        independent: Names of those that had no part in the bundle's training.
        guides: Bundles that differ in `guide`, by the name under which choices ask for them.
    """

    def __init__(
        self,
        protector: diffveil.Protector,
        crops: Pixels,
        people: list[str],
        recognizers: dict[str, Path],
        independent: set[str],
        guides: Mapping[str, diffveil.Protector] = MappingProxyType({}),
    ) -> None:
        self.operations, self.crops = protector.operations, crops
        self._of = {"": protector.operations, **{n: p.operations for n, p in guides.items()}}
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

    def _run(self, choice: Choice, rows: slice) -> NDArray[np.float32]:
        images = self.images[rows]
        keys = [NoiseKey.from_seed(i) for i in range(*rows.indices(len(self.images)))]
        call = getattr(self._of[choice.guide], choice.operation)
        result: NDArray[np.float32] = call(images, choice.plan, keys=keys)[:, 0]
        return result

    def protection(self, choice: Choice, faces: int) -> dict[str, Any]:
        """Match rates of the first `faces` faces under one choice."""
        faces = min(faces, len(self.images))
        parts = [
            self._run(choice, slice(i, min(i + _BATCH, faces))) for i in range(0, faces, _BATCH)
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
            self._run(choice, slice(turn % len(self.images), None, 10**6))
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--guide",
        action="append",
        default=[],
        metavar="NAME=BUNDLE",
        help="also try the guide of this bundle, otherwise the same: one exported with "
        "--guide-decoder",
    )
    parser.add_argument("--max-people", type=int, default=40)
    parser.add_argument("--photos", type=int, default=2, help="at most so many of each person")
    parser.add_argument(
        "--sweep-faces",
        type=int,
        default=40,
        help="faces that recovery is judged on, and every choice but presets and guidance of "
        "anonymize (default: %(default)s)",
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
    guides = {n: diffveil.Protector.load(path) for n, path in named_files(args.guide).items()}
    people = [p.person for p in portraits]
    bench = Bench(protector, crops, people, named, independent, guides)

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
    can = protector.programs.can
    has = can("denoise_few"), protector.bundle.has_surrogates
    for choice in choices(
        args.presets_only,
        has[0],
        guides,
        has_surrogates=has[1],
        has_latent=can("guide_latent"),
    ):
        # One face in a hundred matters for anonymize, and the published hide takes minutes.
        thorough = choice.family in ("presets", "guidance") and choice.operation == "anonymize"
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
            "evaluations": len(choice.plan.fitting(*has).table(schedule).steps),
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
