"""How well faces that are carried by the picture itself come back, and what a wrong key gives.

    python -m benchmarks.carried PEOPLE --recognizer NAME=FILE… [--independent NAME=FILE…]

PEOPLE and recognizers are those of `benchmarks.quality`. Photos are anonymized with `carry`,
changed as the world changes photos (compressed, scaled, noisy), and recovered by
`recover_carried`, which has to find the faces again by itself. TAR is the share of faces that match
their own original, at the cosine that `--far` of the impostor pairs of the originals exceed; beside
it the same against other photos of the person. The figures to compare with are those of arXiv
2510.01031: .705 recovered and .0056 anonymized, by ArcFace, at FAR 0.1 %, on faces and with models
that are not these.

Writes `carried.json` and `carried.png` to `--out`.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import diffveil
from benchmarks._metrics import psnr
from benchmarks._recognizers import ARCFACE_TEMPLATE, Embed, load_recognizer
from benchmarks.protocol.people import Portrait, add_arguments, load_people, named_files
from diffveil.align import crop_face, paste_faces, similarity
from diffveil.carried import face_key
from diffveil.carrying import CarriedFaces
from diffveil.detectors import CenterFace
from diffveil.frames import Frame
from diffveil.noise import NoiseKey
from diffveil.scenes import to_images, to_pixels

Pixels = NDArray[np.uint8]
SECRET = bytes(range(32))
RIVAL = {"paper": "arXiv 2510.01031", "recovered": 0.705, "anonymized": 0.0056, "far": 0.001}


def compressed(quality: int) -> Callable[[Pixels], Pixels]:
    """JPEG, chroma subsampled as Pillow does by default."""

    def change(pixels: Pixels) -> Pixels:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    return change


def scaled(factor: float) -> Callable[[Pixels], Pixels]:
    """Both sides times a factor, bicubic."""

    def change(pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        size = round(width * factor), round(height * factor)
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    return change


def noisy(sigma: float) -> Callable[[Pixels], Pixels]:
    """Gaussian noise of so many levels, the same for photos of one size."""

    def change(pixels: Pixels) -> Pixels:
        noise = np.random.default_rng(0).normal(0.0, sigma, pixels.shape)
        return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)

    return change


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "png": lambda pixels: pixels,
    "jpeg 95": compressed(95),
    "jpeg 90": compressed(90),
    "jpeg 75": compressed(75),
    "jpeg 50": compressed(50),
    "scaled 75 %": scaled(0.75),
    "scaled 150 %": scaled(1.5),
    "noise 4 levels": noisy(4.0),
}


class Judge:
    """A recognizer and the cosine at which it accepts.

    Args:
        embed: Crops to unit embeddings.
        gallery: Original faces, the probes' own first, uint8 [M, 112, 112, 3].
        people: Person of each.
        far: Share of impostor pairs that are accepted.
    """

    def __init__(self, embed: Embed, gallery: Pixels, people: list[str], far: float) -> None:
        self.embed = embed
        self.original = embed(gallery)
        labels = np.unique(people, return_inverse=True)[1]
        self._same = labels[:, None] == labels
        impostors = (self.original @ self.original.T)[np.triu(~self._same, 1)]
        self.pairs = len(impostors)
        self.threshold = float(np.quantile(impostors, 1 - far))

    def score(self, crops: Pixels) -> dict[str, float]:
        """TAR against their own originals and the person's other photos, and the mean cosine."""
        n = len(crops)
        cosines = self.embed(crops) @ self.original.T
        own = np.diagonal(cosines)
        others = self._same[:n] & ~np.eye(n, len(self.original), dtype=bool)
        return {
            "tar": float((own > self.threshold).mean()),
            "tar_other_photos": float((cosines[others] > self.threshold).mean()),
            "cosine": float(own.mean()),
        }


class Bench:
    """Probes, their anonymized photos, and the judges.

    Args:
        protector: What protects and recovers.
        probes: The faces to protect.
        judges: Recognizers by name.
    """

    def __init__(
        self, protector: diffveil.Protector, probes: list[Portrait], judges: dict[str, Judge]
    ) -> None:
        self.protector, self.probes, self.judges = protector, probes, judges
        self.photos: list[Pixels | None] = []
        for probe in probes:
            try:
                result = protector.anonymize(probe.pixels, carry=True, secret=SECRET)
                self.photos.append(np.asarray(result))
            except diffveil.NoFaceError:
                self.photos.append(None)
        self.rows: dict[str, dict[str, Any]] = {}

    @property
    def carried(self) -> list[int]:
        """Probes that could be protected."""
        return [i for i, photo in enumerate(self.photos) if photo is not None]

    def record(self, name: str, photos: list[Pixels]) -> None:
        """Judge photos of all probes; a black one is a failure."""
        crops = np.stack([self.arcface(i, photo) for i, photo in enumerate(photos)])
        row: dict[str, Any] = {n: judge.score(crops) for n, judge in self.judges.items()}
        originals = [self.arcface(i, probe.pixels) for i, probe in enumerate(self.probes)]
        row["psnr"] = float(np.mean([psnr(a, b) for a, b in zip(crops, originals, strict=True)]))
        for probe, photo in zip(self.probes, photos, strict=True):
            probe.outputs[name] = photo
        self.rows[name] = row
        told = ", ".join(f"{n} {row[n]['tar']:.3f} ({row[n]['cosine']:.2f})" for n in self.judges)
        print(f"{name}: TAR (cosine) {told}", flush=True)

    def arcface(self, index: int, photo: Pixels) -> Pixels:
        """A photo's face, cut out by the landmarks of the original."""
        probe = self.probes[index]
        if photo.shape != probe.pixels.shape:
            size = probe.pixels.shape[1::-1]
            photo = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC))
        return crop_face(photo, similarity(probe.face.landmarks, ARCFACE_TEMPLATE), 112)

    def recovered(self, name: str, change: Callable[[Pixels], Pixels], secret: bytes) -> None:
        """Record what a secret recovers from changed photos."""
        photos = [p.pixels for p in self.probes]
        changed = [change(photo) for photo in self.photos if photo is not None]
        results = []
        for start in range(0, len(changed), 16):
            results += self.protector.recover_carried(
                changed[start : start + 16], secret, on_missing="keep"
            )
        blank = [np.zeros_like(photo) for photo in photos]
        for index, result in zip(self.carried, results, strict=True):
            blank[index] = np.asarray(result)
        self.record(name, blank)

    def other_faces_key(self) -> None:
        """Record what the key of another face, under the same secret, recovers."""
        operations = self.protector.operations
        carrier, size = CarriedFaces(operations), operations.bundle.image_size
        secret = NoiseKey.from_bytes(SECRET)
        photos = [np.zeros_like(p.pixels) for p in self.probes]
        for index in self.carried:
            photo = self.photos[index]
            assert photo is not None
            found = self.protector.detector.detect(photo)[0]
            matrix = similarity(found.landmarks, operations.bundle.template)
            frame = Frame.nearest(matrix, photo.shape[:2], size)
            other = Frame(frame.column + 1, frame.row, frame.scale, frame.turn)
            matrix = frame.matrix(photo.shape[:2], size)
            crop = to_images(crop_face(photo, matrix, size)[None])
            face = to_pixels(carrier.reveal(crop, [face_key(secret, other)]))
            photos[index] = paste_faces(photo, [face[0]], [matrix], carrier.mask)
        self.record("another face's key", photos)


def sheet(bench: Bench, names: list[str], count: int = 10) -> Image.Image:
    """One row a treatment, one column a person."""
    shown = bench.carried[:: max(1, len(bench.carried) // count)][:count]
    rows = [[bench.probes[i].pixels for i in shown]]
    rows += [[bench.probes[i].outputs[name] for i in shown] for name in names]
    lines = []
    for row in rows:
        cells = [
            np.asarray(Image.fromarray(photo).resize((128, 128), Image.Resampling.BICUBIC))
            for photo in row
        ]
        lines.append(np.concatenate(cells, axis=1))
    return Image.fromarray(np.concatenate(lines))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--faces", type=int, default=40, help="faces, one a person")
    parser.add_argument("--gallery", type=int, default=6, help="photos a person for impostor pairs")
    parser.add_argument("--far", type=float, default=0.001)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("carried"))
    args = parser.parse_args(argv)

    named = named_files([*args.recognizer, *args.independent])
    if not named:
        parser.error("give at least one --recognizer or --independent")
    protector = diffveil.Protector.load(args.bundle, threads=args.threads)
    everyone, _ = load_people(
        args.people, 1000, args.gallery, CenterFace.load(threads=args.threads)
    )
    first: dict[str, Portrait] = {}
    for portrait in everyone:
        first.setdefault(portrait.person, portrait)
    probes = list(first.values())[: args.faces]
    gallery = [*probes, *[p for p in everyone if p not in probes]]
    crops = np.stack([p.crop("original", ARCFACE_TEMPLATE, 112) for p in gallery])
    people = [p.person for p in gallery]
    judges = {n: Judge(load_recognizer(f), crops, people, args.far) for n, f in named.items()}

    bench = Bench(protector, probes, judges)
    bench.record(
        "anonymized",
        [
            p.pixels if photo is None else photo
            for p, photo in zip(probes, bench.photos, strict=True)
        ],
    )
    for name, change in CHANGES.items():
        bench.recovered(name, change, SECRET)
    bit = bytes([SECRET[0] ^ 1, *SECRET[1:]])
    bench.recovered("one bit of the key wrong", CHANGES["png"], bit)
    bench.recovered("a random key", CHANGES["png"], bytes(31 * i % 251 for i in range(32)))
    bench.other_faces_key()

    report = {
        "bundle": protector.bundle.name,
        "fingerprint": protector.bundle.fingerprint,
        "faces": len(probes),
        "refused": len(probes) - len(bench.carried),
        "far": args.far,
        "gallery": len(gallery),
        "judges": {
            n: {
                "independent": n in named_files(args.independent),
                "threshold": judge.threshold,
                "impostor_pairs": judge.pairs,
            }
            for n, judge in judges.items()
        },
        "rival": RIVAL,
        "results": bench.rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "carried.json").write_text(json.dumps(report, indent=1) + "\n")
    shown = ["anonymized", "png", "jpeg 75", "jpeg 50", "one bit of the key wrong"]
    sheet(bench, shown).save(args.out / "carried.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
