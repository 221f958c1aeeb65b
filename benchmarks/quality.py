"""How well faces are protected, hidden and recovered, measured on a folder of people.

    python -m benchmarks.quality PEOPLE --recognizer NAME=FILE… [--independent NAME=FILE…]

PEOPLE holds `person/photo.jpg`: whole photos or face crops. Recognizers are ONNX or TorchScript
files that take ArcFace-aligned RGB 0…255 [N, 3, 112, 112]; those given as `--independent` had no
part in training the bundle. Every probe is cropped by the *original* photo's landmarks and compared
with original photos; thresholds come from the impostor pairs of the originals themselves.

Writes `quality.json`, `quality.md` and contact sheets to `--out`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

import diffveil
from benchmarks._metrics import Verification, frechet_distance, psnr
from benchmarks._recognizers import ARCFACE_TEMPLATE, load_recognizer
from diffveil.align import crop_face, similarity
from diffveil.detectors import CenterFace
from diffveil.faces import Face
from diffveil.photos import load_photo
from diffveil.presets import preset as preset_named
from diffveil.scenes import to_images, to_pixels

Pixels = NDArray[np.uint8]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
FAR = 0.01
OPERATIONS = ("anonymize", "hide", "recover")


@dataclass(eq=False)
class Portrait:
    """One photo of a person, its face, and what the operations made of it."""

    person: str
    pixels: Pixels
    face: Face
    outputs: dict[str, Pixels] = field(default_factory=dict)

    def crop(self, operation: str, template: NDArray[np.float64], size: int) -> Pixels:
        """The output's face, cut out by the landmarks of the original."""
        source = self.outputs.get(operation, self.pixels)
        return crop_face(source, similarity(self.face.landmarks, template), size)


def load_people(
    root: Path, people: int, photos: int, detector: CenterFace
) -> tuple[list[Portrait], int]:
    """Portraits of up to `people` people, and the number of photos without a face."""
    portraits, missed = [], 0
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    for folder in folders[:people]:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        for path in files[:photos]:
            pixels = load_photo(path).pixels
            faces = detector.detect(pixels)
            if not faces:
                missed += 1
                continue
            # The subject stands nearest the centre; a bystander in the back may score higher.
            centre = np.array(pixels.shape[1::-1]) / 2
            face = min(faces, key=lambda f: float(np.linalg.norm(f.landmarks.mean(0) - centre)))
            portraits.append(Portrait(folder.name, pixels, face))
    return portraits, missed


def protect_all(
    protector: diffveil.Protector, portraits: list[Portrait], preset: str, batch: int
) -> None:
    """Fill every portrait's outputs."""
    for start in range(0, len(portraits), batch):
        part = portraits[start : start + batch]
        photos, faces = [p.pixels for p in part], [[p.face] for p in part]
        anonymized = protector.anonymize(photos, faces=faces, preset=preset, seed=start)
        hidden = protector.hide(photos, faces=faces, preset=preset, seed=start, make_key=False)
        recovered = [protector.recover(r.image, r.key) for r in anonymized]
        for portrait, a, h, r in zip(part, anonymized, hidden, recovered, strict=True):
            portrait.outputs["anonymize"] = np.asarray(a.image.convert("RGB"))
            portrait.outputs["hide"] = np.asarray(h.image.convert("RGB"))
            portrait.outputs["recover"] = np.asarray(_image(r).convert("RGB"))
        _note(f"{min(start + batch, len(portraits))}/{len(portraits)} faces")


def _image(result: Any) -> Image.Image:
    image: Image.Image = getattr(result, "image", result)
    return image


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def blurred(pixels: Pixels) -> Pixels:
    """A face crop as strong blurring leaves it: the tool that people use today."""
    return np.asarray(
        Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(pixels.shape[0] / 10))
    )


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


def recognition(
    portraits: list[Portrait],
    recognizers: dict[str, Path],
    independent: set[str],
    protector: diffveil.Protector,
) -> list[dict[str, Any]]:
    """Match rates and feature distances, one row a recognizer."""
    people = [p.person for p in portraits]
    shift = (protector.bundle.image_size - 112) // 2
    crops = {
        op: np.stack([p.crop(op, ARCFACE_TEMPLATE, 112) for p in portraits])
        for op in ("original", *OPERATIONS)
    }
    crops["round trip"] = np.stack(
        [p.outputs["round trip"][shift : shift + 112, shift : shift + 112] for p in portraits]
    )
    crops["blur"] = np.stack([blurred(c) for c in crops["original"]])
    rows = []
    for name, path in recognizers.items():
        embed = load_recognizer(path)
        vectors = {op: embed(c) for op, c in crops.items()}
        rows.append(_recognition_row(name, name in independent, vectors, people))
        _note(f"recognizer {name}")
    size, template = protector.bundle.image_size, np.asarray(protector.bundle.template)
    own = {}
    for op in ("original", *OPERATIONS):
        images = to_images(np.stack([p.crop(op, template, size) for p in portraits]))
        own[op] = np.concatenate(
            [protector.operations.embed(images[i : i + 32]) for i in range(0, len(images), 32)]
        )
    rows.append(_recognition_row("bundle", False, own, people))
    return rows


def _recognition_row(
    name: str, independent: bool, vectors: dict[str, NDArray[np.float32]], people: list[str]
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


def perception(portraits: list[Portrait], detector: CenterFace) -> dict[str, float]:
    """What remains of the photo: detected faces, structural similarity."""
    from skimage.metrics import structural_similarity

    found: dict[str, list[bool]] = {op: [] for op in OPERATIONS}
    alike: dict[str, list[float]] = {op: [] for op in OPERATIONS}
    for portrait in portraits:
        original = portrait.crop("original", ARCFACE_TEMPLATE, 112)
        middle = portrait.face.landmarks.mean(0)
        reach = 0.5 * max(portrait.face.width, portrait.face.height)
        for op in OPERATIONS:
            faces = detector.detect(portrait.outputs[op])
            distances = [float(np.linalg.norm(f.landmarks.mean(0) - middle)) for f in faces]
            found[op].append(min(distances, default=np.inf) < reach)
            crop = portrait.crop(op, ARCFACE_TEMPLATE, 112)
            alike[op].append(float(structural_similarity(original, crop, channel_axis=2)))
    return {f"detected_{op}": float(np.mean(v)) for op, v in found.items()} | {
        f"ssim_{op}": float(np.mean(v)) for op, v in alike.items()
    }


def speed(
    protector: diffveil.Protector, portrait: Portrait, preset: str, repeats: int = 5
) -> dict[str, float]:
    """Median wall-clock seconds of one call on one photo with one face; detection excluded."""
    result = protector.anonymize(portrait.pixels, faces=[portrait.face], preset=preset)
    calls = {
        "anonymize": lambda: protector.anonymize(
            portrait.pixels, faces=[portrait.face], preset=preset, make_key=False
        ),
        "anonymize_with_key": lambda: protector.anonymize(
            portrait.pixels, faces=[portrait.face], preset=preset
        ),
        "anonymize_four_variants_with_key": lambda: protector.anonymize(
            portrait.pixels, faces=[portrait.face], preset=preset, variants=4
        ),
        "hide": lambda: protector.hide(
            portrait.pixels, faces=[portrait.face], preset=preset, make_key=False
        ),
        "recover": lambda: protector.recover(result.image, result.key),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:  # the first round loads programs and warms caches
                times[name].append(time.perf_counter() - started)
    return {f"{name}_s": float(np.median(v)) for name, v in times.items()}


def contact_sheet(
    portraits: list[Portrait], protector: diffveil.Protector, count: int = 24
) -> Image.Image:
    """Original, anonymized, hidden and recovered faces of different people, side by side."""
    size, template = protector.bundle.image_size, np.asarray(protector.bundle.template)
    by_person: dict[str, Portrait] = {}
    for portrait in portraits:
        by_person.setdefault(portrait.person, portrait)
    shown = [*by_person.values(), *[p for p in portraits if p not in by_person.values()]][:count]
    rows = []
    for start in range(0, len(shown), 8):
        part = shown[start : start + 8]
        for op in ("original", *OPERATIONS):
            line = np.concatenate([p.crop(op, template, size) for p in part], 1)
            rows.append(
                np.pad(
                    line,
                    ((0, 8 if op == "recover" else 2), (0, 128 * 8 - line.shape[1]), (0, 0)),
                    constant_values=255,
                )
            )
    return Image.fromarray(np.concatenate(rows))


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
        f"| anonymize | CenterFace still finds a face | {per['detected_anonymize']:.1%} |",
        f"| hide | CenterFace still finds a face | {per['detected_hide']:.1%} |",
        f"| hide | SSIM to the original, ArcFace crop | {per['ssim_hide']:.2f} |",
    ]
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
    for row in report["recognition"]:
        if "round trip" in row:
            values = ", ".join(
                f"{op} {row[op]['frechet']:.3f}"
                for op in ("original", "round trip", "anonymize", "hide", "blur")
            )
            lines.append(
                f"| natural | Fréchet distance of {row['recognizer']} features to other real faces "
                f"| {values} |"
            )
    for name, value in spd.items():
        unit = "×" if name.endswith("ratio") else " s"
        lines.append(f"| speed | {name.removesuffix('_s').replace('_', ' ')} | {value:.2f}{unit} |")
    return "\n".join(lines) + "\n"


def insert(document: Path, table: str, name: str = "quality") -> None:
    """Put the table between the markers of that name in a Markdown file."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = document.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{document}: expected the markers {begin} and {end}")
    document.write_text(f"{before}{begin}\n{table}{end}{after}", encoding="utf-8")


def named_files(values: Iterable[str]) -> dict[str, Path]:
    """Files by name, of arguments NAME=FILE."""
    return {name: Path(path) for name, _, path in (v.partition("=") for v in values)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("people", type=Path, metavar="PEOPLE")
    parser.add_argument("--recognizer", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--independent", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--max-people", type=int, default=40)
    parser.add_argument("--photos", type=int, default=5, help="at most so many of each person")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("quality"))
    parser.add_argument(
        "--oracle", action="store_true", help="time the published recipe in PyTorch as well"
    )
    parser.add_argument("--readme", type=Path, help="Markdown file whose table to replace")
    args = parser.parse_args(argv)

    protector = diffveil.Protector.load(args.bundle)
    detector = CenterFace.load()
    portraits, missed = load_people(args.people, args.max_people, args.photos, detector)
    if len({p.person for p in portraits}) < 2:
        parser.error(f"{args.people}: expected person/photo.jpg of at least two people")
    _note(f"{len(portraits)} faces, {missed} photos without one")
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
    report["speed"] = speed(protector, portraits[0], args.preset)
    if args.oracle:
        from benchmarks._oracle import paper_seconds

        one, released = paper_seconds(
            protector.bundle,
            portraits[0].crop(
                "original", np.asarray(protector.bundle.template), protector.bundle.image_size
            ),
        )
        report["speed"] |= {
            "paper_recipe_in_pytorch_one_variant_s": one,
            "paper_recipe_in_pytorch_as_released_s": released,
            "anonymize_over_paper_one_variant_ratio": one / report["speed"]["anonymize_s"],
            "anonymize_over_paper_as_released_ratio": (
                released / report["speed"]["anonymize_four_variants_with_key_s"]
            ),
        }
    report["fidelity"] = fidelity(protector, portraits, args.preset)
    protect_all(protector, portraits, args.preset, args.batch)
    report["perception"] = perception(portraits, detector)
    named = named_files(args.independent)
    report["recognition"] = recognition(
        portraits, named_files(args.recognizer) | named, set(named), protector
    )

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "quality.md").write_text(as_markdown(report))
    contact_sheet(portraits, protector).save(args.out / "contact-sheet.png")
    if args.readme:
        insert(args.readme, as_markdown(report))
    print(as_markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
