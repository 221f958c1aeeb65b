"""How well faces are protected, hidden and recovered, measured on a folder of people.

    python -m benchmarks.quality PEOPLE --recognizer NAME=FILE… [--independent NAME=FILE…]

PEOPLE holds `person/photo.jpg`: whole photos or face crops; `attributes.csv` there, or a file given
with `--attributes`, labels them for a breakdown: a column `file` or `person`, others attributes.
Recognizers are ONNX or TorchScript files that take ArcFace-aligned RGB 0…255 [N, 3, 112, 112];
those given as `--independent` had no part in training the bundle. Every probe is cropped by the
*original* photo's landmarks and compared with original photos; thresholds come from the impostor
pairs of the originals themselves. Blur and mosaic, as `deface` draws them, stand beside ours.

Writes `quality.json`, `quality.md` (the README's table), `protocol.md` (all tables),
`cosines.png` and contact sheets to `--out`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import diffveil
from benchmarks._metrics import psnr
from benchmarks.protocol import report as protocol_report
from benchmarks.protocol.baselines import BASELINES
from benchmarks.protocol.collect import FARS, KINDS, collect, draw_baselines, pictures
from benchmarks.protocol.groups import read_attributes
from benchmarks.protocol.judges import load_judges
from benchmarks.protocol.people import Portrait, add_arguments, load_people, named_files
from benchmarks.protocol.perception import looks, yardsticks
from benchmarks.protocol.pictures import contact_sheet
from benchmarks.protocol.summary import OPERATIONS, as_markdown, recognition
from benchmarks.protocol.tables import insert, write_json
from diffveil.detectors import CenterFace
from diffveil.keys import RecoveryKey
from diffveil.presets import preset as preset_named
from diffveil.result import Result
from diffveil.scenes import to_images, to_pixels

FAR = FARS[0]


def protect_all(
    protector: diffveil.Protector, portraits: list[Portrait], preset: str, batch: int
) -> list[RecoveryKey]:
    """Fill every portrait's outputs; the recovery keys of the anonymized ones."""
    keys: list[RecoveryKey] = []
    for start in range(0, len(portraits), batch):
        part = portraits[start : start + batch]
        photos, faces = [p.pixels for p in part], [[p.face] for p in part]
        anonymized = protector.anonymize(photos, faces=faces, preset=preset, seed=start)
        hidden = protector.hide(photos, faces=faces, preset=preset, seed=start, make_key=False)
        made = [key_of(r) for r in anonymized]
        recovered = [
            protector.recover(r.image, key) for r, key in zip(anonymized, made, strict=True)
        ]
        for portrait, a, h, r in zip(part, anonymized, hidden, recovered, strict=True):
            portrait.outputs["anonymize"] = np.asarray(a.image.convert("RGB"))
            portrait.outputs["hide"] = np.asarray(h.image.convert("RGB"))
            portrait.outputs["recover"] = np.asarray(r.image.convert("RGB"))
        keys += made
        _note(f"{min(start + batch, len(portraits))}/{len(portraits)} faces")
    return keys


def key_of(result: Result) -> RecoveryKey:
    """The key that was asked for."""
    assert result.key is not None
    return result.key


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fidelity(
    protector: diffveil.Protector, portraits: list[Portrait], preset: str
) -> dict[str, float]:
    """Autoencoder round trip and recovery of aligned crops, in dB."""
    bundle, operations = protector.bundle, protector.operations
    size, template = bundle.image_size, np.asarray(bundle.template)
    inversion = preset_named(preset).recovery
    trips, recoveries = [], []
    for start in range(0, len(portraits), 16):
        crops = np.stack(
            [p.crop("original", template, size) for p in portraits[start : start + 16]]
        )
        images = to_images(crops)
        batch = operations.prepare(images)
        trip = to_pixels(np.clip(protector.programs.decode(latent=batch.latents), -1, 1))
        back = to_pixels(operations.recover(*operations.invert(batch, inversion), inversion))
        for portrait, crop, a, b in zip(portraits[start:], crops, trip, back, strict=False):
            portrait.outputs["round trip"] = a
            trips.append(psnr(a, crop))
            recoveries.append(psnr(b, crop))
    trip_db, recovered_db = float(np.mean(trips)), float(np.mean(recoveries))
    return {
        "round_trip_db": trip_db,
        "recovered_db": recovered_db,
        "loss_db": trip_db - recovered_db,
        "recovery_steps": inversion.steps,
    }


def speed(
    protector: diffveil.Protector, portraits: list[Portrait], preset: str, repeats: int
) -> dict[str, float]:
    """Median wall-clock seconds of one call on one photo with one face; detection excluded.

    Every turn takes the next face: some are drawn more than once, which the mean shows.
    """
    times: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        for name, call in _calls(protector, portraits[turn % len(portraits)], preset).items():
            started = time.perf_counter()
            call()
            if turn:  # the first round loads programs and warms caches
                times.setdefault(name, []).append(time.perf_counter() - started)
    seconds = {f"{name}_s": float(np.median(v)) for name, v in times.items()}
    means = {f"{verb}_mean_s": float(np.mean(times[verb])) for verb in ("anonymize", "hide")}
    return seconds | means


def _calls(
    protector: diffveil.Protector, portrait: Portrait, preset: str
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    photo, faces = portrait.pixels, [portrait.face]
    result = protector.anonymize(photo, faces=faces, preset=preset)
    return {
        "anonymize": lambda: protector.anonymize(photo, faces=faces, preset=preset, make_key=False),
        "anonymize_with_key": lambda: protector.anonymize(photo, faces=faces, preset=preset),
        "anonymize_four_variants_with_key": lambda: protector.anonymize(
            photo, faces=faces, preset=preset, variants=4
        ),
        "hide": lambda: protector.hide(photo, faces=faces, preset=preset, make_key=False),
        "recover": lambda: protector.recover(result.image, key_of(result)),
        "blur": lambda: BASELINES["blur"](photo, portrait.face),
        "mosaic": lambda: BASELINES["mosaic"](photo, portrait.face),
    }


def main(argv: list[str] | None = None) -> int:
    args, parser = _arguments(argv)
    protector = diffveil.Protector.load(args.bundle, threads=args.threads)
    detector = CenterFace.load(threads=args.threads)
    known, missed = load_people(
        args.people, args.max_people, max(args.photos, args.gallery), detector
    )
    portraits, gallery = _divided(known, args.photos, args.gallery)
    if len({p.person for p in portraits}) < 2:
        parser.error(f"{args.people}: expected person/photo.jpg of at least two people")
    _note(f"{len(portraits)} faces, {missed} photos without one")
    independent = named_files(args.independent)
    try:
        labels = args.attributes or args.people / "attributes.csv"
        attributes = read_attributes(labels) if args.attributes or labels.exists() else {}
        files = named_files(args.recognizer) | independent
        judges = load_judges(protector, files, set(independent))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    report: dict[str, Any] = {
        "faces": len(portraits),
        "people": len({p.person for p in portraits}),
        "photos_without_face": missed,
        "bundle": protector.bundle.name,
        "fingerprint": protector.bundle.fingerprint,
        "preset": args.preset,
        "backend": protector.backend,
        "machine": platform.machine(),
        "versions": {"diffveil": diffveil.__version__, "numpy": np.__version__},
        "far": FAR,
    }
    report["speed"] = speed(protector, portraits, args.preset, args.repeats)
    if args.oracle:
        report["speed"] |= _paper_speed(protector, portraits[0], report["speed"])
    report["fidelity"] = fidelity(protector, portraits, args.preset)
    keys = protect_all(protector, portraits, args.preset, args.batch)
    draw_baselines(portraits)
    for judge in judges:
        judge.look(portraits, gallery, list(KINDS))
        _note(f"recognizer {judge.name}")
    template, size = np.asarray(protector.bundle.template), protector.bundle.image_size
    report["perception"] = looks(portraits, KINDS, detector)
    report["ssim_yardsticks"] = yardsticks(portraits, template, size)
    report["recognition"] = recognition(portraits, judges)
    args.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(portraits, ["original", *OPERATIONS], template, size).save(
        args.out / "contact-sheet.png"
    )
    if not args.brief:
        pictures(protector, portraits, judges, args.out)
        report["protocol"] = {}
        for name, section in collect(
            protector,
            portraits,
            keys,
            judges,
            preset=args.preset,
            attributes=attributes,
            few=args.few,
        ):
            report["protocol"][name] = section
            text = protocol_report.as_markdown(report)
            (args.out / "protocol.md").write_text(text)
            write_json(args.out / "quality.json", report)
            _note(name)
        if args.document:
            insert(args.document, text)
    write_json(args.out / "quality.json", report)
    (args.out / "quality.md").write_text(as_markdown(report))
    if args.readme:
        insert(args.readme, as_markdown(report))
    print(as_markdown(report))
    return 0


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    add = parser.add_argument
    add("--attributes", type=Path, metavar="CSV", help="default: PEOPLE/attributes.csv")
    add("--preset", default="fast")
    add("--max-people", type=int, default=40)
    add("--photos", type=int, default=5, help="protected of each person, at most")
    add("--gallery", type=int, default=10, help="originals known of each person, at most")
    add("--few", type=int, default=24, help="faces of tables that run the model again")
    add("--repeats", type=int, default=5, help="faces that each operation is timed on")
    add("--batch", type=int, default=8)
    add("--threads", type=int, help="of the runtime; fewer where others compute")
    add("--out", type=Path, default=Path("quality"))
    add("--brief", action="store_true", help="the README's table alone")
    add("--oracle", action="store_true", help="time the published recipe in PyTorch as well")
    add("--readme", type=Path, help="Markdown file whose table to replace")
    add("--document", type=Path, help="Markdown file whose protocol tables to replace")
    return parser.parse_args(argv), parser


def _divided(
    known: list[Portrait], photos: int, gallery: int
) -> tuple[list[Portrait], list[Portrait]]:
    """The portraits to protect, and the gallery: these first, then others of the same people."""
    seen: dict[str, int] = {}
    protected, others = [], []
    for portrait in known:
        index = seen[portrait.person] = seen.get(portrait.person, 0) + 1
        if index <= photos:
            protected.append(portrait)
        elif index <= gallery:
            others.append(portrait)
    return protected, [*protected, *others]


def _paper_speed(
    protector: diffveil.Protector, portrait: Portrait, ours: dict[str, float]
) -> dict[str, float]:
    """Seconds of the published recipe in PyTorch, and how many times ours is faster."""
    from benchmarks._oracle import paper_seconds

    bundle = protector.bundle
    crop = portrait.crop("original", np.asarray(bundle.template), bundle.image_size)
    one, released = paper_seconds(bundle, crop)
    return {
        "paper_recipe_in_pytorch_one_variant_s": one,
        "paper_recipe_in_pytorch_as_released_s": released,
        "anonymize_over_paper_one_variant_ratio": one / ours["anonymize_s"],
        "anonymize_over_paper_as_released_ratio": (
            released / ours["anonymize_four_variants_with_key_s"]
        ),
    }


if __name__ == "__main__":
    raise SystemExit(main())
