"""Can protection be undone by learning? A network trained on pairs, judged on other people.

    python -m benchmarks.attack TRAIN PEOPLE --recognizer NAME=FILE… [--independent NAME=FILE…]

TRAIN is any folder of faces; photos below a folder that is named like one of PEOPLE are left out.
PEOPLE holds `person/photo.jpg`. The attacker has this library, the bundle, the preset and pairs of
protected and original photos of others, and no key. One small U-Net is trained for anonymized
faces, one for blurred and one for mosaic faces, in turns, with the same steps on the same photos;
each restores protected faces of PEOPLE. Rates are those of `benchmarks.quality`.

Everything is kept in `--out`: break it off whenever you like, the same command goes on. Writes
`attack.json`, `attack.md` and `attack.png`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import diffveil
from benchmarks._metrics import psnr
from benchmarks._recognizers import ARCFACE_TEMPLATE, load_recognizer
from benchmarks.protocol.baselines import BASELINES
from benchmarks.protocol.judges import DISTILLED, INDEPENDENT
from benchmarks.protocol.pairs import Protection, make_pairs, training_files
from benchmarks.protocol.people import Pixels, Portrait, add_arguments, load_people, named_files
from benchmarks.protocol.tables import insert, interval, percent, table, write_json
from benchmarks.protocol.verification import Gallery
from diffveil.align import crop_face, similarity
from diffveil.detectors import CenterFace

FARS = (0.01, 0.001)
_SHOWN = 12


def protections(protector: diffveil.Protector, preset: str, seed: int) -> dict[str, Protection]:
    """Ours and the baselines, by name; every photo of ours has noise of its own."""

    def anonymize(portraits: list[Portrait], first: int) -> list[Pixels]:
        results = protector.anonymize(
            [p.pixels for p in portraits],
            faces=[[p.face] for p in portraits],
            preset=preset,
            seed=seed + first,
            make_key=False,
        )
        return [np.asarray(result.image.convert("RGB")) for result in results]

    def baseline(name: str) -> Protection:
        draw = BASELINES[name]
        return lambda portraits, first: [draw(p.pixels, p.face) for p in portraits]

    return {"anonymize": anonymize, **{name: baseline(name) for name in BASELINES}}


def judge(
    faces: Mapping[str, Pixels],
    people: list[str],
    recognizers: Mapping[str, Path],
    independent: set[str],
    template: Any,
) -> dict[str, Any]:
    """PSNR and recognition of aligned faces against their originals.

    Args:
        faces: `original` and others of the same photos, uint8 [N, S, S, 3].
        people: Person of each photo.
        recognizers: Files by name.
        independent: Names of those that had no part in the bundle's training.
        template: Of the aligned faces, [5, 2].

    Returns:
        `psnr` by name of faces, and `recognition`, a row a recognizer.
    """
    to_arcface = similarity(template, ARCFACE_TEMPLATE)
    noise = {
        name: float(np.mean([psnr(a, b) for a, b in zip(crops, faces["original"], strict=True)]))
        for name, crops in faces.items()
        if name != "original"
    }
    rows = []
    for name, path in recognizers.items():
        embed = load_recognizer(path)
        vectors = {
            kind: embed(np.stack([crop_face(crop, to_arcface, 112) for crop in crops]))
            for kind, crops in faces.items()
        }
        gallery, own = Gallery(vectors["original"], people), np.arange(len(people))
        rows.append(
            {
                "recognizer": name,
                "independent": name in independent,
                **{kind: gallery.rates(v, own, FARS) for kind, v in vectors.items()},
            }
        )
    return {"psnr": noise, "recognition": rows}


def as_markdown(report: dict[str, Any]) -> str:
    """What each network regained, a row a protection and recognizer."""
    lines = [
        f"A U-Net of {report['parameters'] / 1e6:.1f} M parameters for each protection, "
        f"{report['training']['steps']} steps of {report['batch']} faces out of "
        f"{report['pairs']} pairs of other people "
        f"({report['training']['seconds'] / 60:.0f} min for all in turns); judged on "
        f"{report['faces']} faces of {report['people']} people; bundle `{report['bundle']}`, "
        f"preset `{report['preset']}`.",
        "",
    ]
    head = ("protection", "PSNR before → after", "recognizer", "cosine before → after")
    rates = ("TAR at FAR 1 %, same photo, before → after", "other photos", "rank-1")
    rows = []
    for name in report["protections"]:
        before, after = (report["psnr"][kind] for kind in (name, f"{name} restored"))
        for row in report["recognition"]:
            a, b = row[name], row[f"{name} restored"]
            one, other = a["at"]["0.01"], b["at"]["0.01"]
            changes = [(one[k], other[k]) for k in ("same_photo", "other_photos")]
            changes.append((a["rank1"], b["rank1"]))
            cells = [f"{percent(x)} → {interval(y)}" for x, y in changes]
            kind = INDEPENDENT if row["independent"] else DISTILLED
            who = f"{row['recognizer']} ({kind})"
            rows.append(
                (
                    name,
                    f"{before:.1f} → {after:.1f} dB",
                    who,
                    f"{a['cosine']:.2f} → {b['cosine']:.2f}",
                    *cells,
                )
            )
    return "\n".join([*lines, *table(*head, *rates, rows=rows)]) + "\n"


def sheet(faces: Mapping[str, Pixels], people: list[str]) -> Pixels:
    """Original, protected and restored faces of different people, one column each."""
    first = [people.index(person) for person in dict.fromkeys(people)][:_SHOWN]
    rows: Pixels = np.concatenate(
        [np.concatenate(list(crops[first]), axis=1) for crops in faces.values()]
    )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path, metavar="TRAIN")
    add_arguments(parser)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--pairs", type=int, default=2000, help="training photos")
    parser.add_argument("--pair-minutes", type=float, default=60, help="at most, for making pairs")
    parser.add_argument("--minutes", type=float, default=15, help="at most, for all networks")
    parser.add_argument("--steps", type=int, default=100_000, help="at most, of each network")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=64, help="channels of the networks")
    parser.add_argument("--threads", type=int, help="of the runtime; fewer where others compute")
    parser.add_argument("--max-people", type=int, default=40)
    parser.add_argument("--photos", type=int, default=2, help="at most so many of each person")
    parser.add_argument("--pairs-only", action="store_true", help="stop before training")
    parser.add_argument("--out", type=Path, default=Path("attack"))
    parser.add_argument("--document", type=Path, help="Markdown file whose table to replace")
    args = parser.parse_args(argv)
    # Late: PyTorch takes seconds, and usage errors should not.
    from benchmarks.protocol.restoration import Budget, restore, train

    recognizers = named_files([*args.recognizer, *args.independent])
    if not recognizers:
        parser.error("give at least one --recognizer or --independent")
    protector, detector = (
        diffveil.Protector.load(args.bundle, threads=args.threads),
        CenterFace.load(threads=args.threads),
    )
    template, size = np.asarray(protector.bundle.template), protector.bundle.image_size
    judged = {p.name for p in args.people.iterdir() if p.is_dir()}
    files = training_files(args.train, judged, args.pairs)
    made_with = {"bundle": protector.bundle.fingerprint, "preset": args.preset}
    until = time.monotonic() + 60 * args.pair_minutes
    ways = protections(protector, args.preset, seed=1)
    try:
        faces = make_pairs(
            args.out / "pairs",
            files,
            ways,
            detector,
            (template, size),
            made_with=made_with,
            note=_note,
            more=lambda: time.monotonic() < until,
        )
        if args.pairs_only:
            return 0
        budget = Budget(args.minutes, args.steps, args.batch)
        nets, training = train(
            faces["original"],
            {name: faces[name] for name in ways},
            budget,
            args.out / "networks.pt",
            made_with=made_with,
            width=args.width,
            note=_note,
        )
    except ValueError as error:
        raise SystemExit(str(error)) from error

    portraits, _ = load_people(args.people, args.max_people, args.photos, detector)
    people = [p.person for p in portraits]
    if len(set(people)) < 2:
        parser.error(f"{args.people}: expected person/photo.jpg of at least two people")
    shown = {"original": np.stack([p.crop("original", template, size) for p in portraits])}
    # Seeds of its own: the attacker has seen none of these noises.
    for name, protect in protections(protector, args.preset, seed=10**9).items():
        for start in range(0, len(portraits), 8):
            part = portraits[start : start + 8]
            for portrait, pixels in zip(part, protect(part, start), strict=True):
                portrait.outputs[name] = pixels
        shown[name] = np.stack([p.crop(name, template, size) for p in portraits])
        shown[f"{name} restored"] = restore(nets[name], shown[name])
    report: dict[str, Any] = {
        "faces": len(portraits),
        "people": len(set(people)),
        "pairs": len(faces["original"]),
        "protections": list(ways),
        "parameters": sum(p.numel() for p in next(iter(nets.values())).parameters()),
        "batch": args.batch,
        "training": training,
        "bundle": protector.bundle.name,
        "fingerprint": protector.bundle.fingerprint,
        "preset": args.preset,
        "backend": protector.backend,
        "machine": platform.machine(),
        "versions": {"diffveil": diffveil.__version__, "numpy": np.__version__},
        **judge(shown, people, recognizers, set(named_files(args.independent)), template),
    }
    write(args.out, report, shown, people)
    if args.document:
        insert(args.document, as_markdown(report), "attack")
    print(as_markdown(report))
    return 0


def write(
    folder: Path, report: dict[str, Any], faces: Mapping[str, Pixels], people: list[str]
) -> None:
    """Report, table and picture."""
    from PIL import Image

    write_json(folder / "attack.json", report)
    (folder / "attack.md").write_text(as_markdown(report))
    Image.fromarray(sheet(faces, people)).save(folder / "attack.png")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
