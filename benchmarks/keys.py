"""What a recovery key weighs, and what keeping it in float16 costs recovery.

    python -m benchmarks.keys PHOTOS [--bundle DIR] [--faces 40]

PHOTOS is a folder of photos; every face that the detector finds counts. Prints the bytes of sealed
files; how many copies and how many other photos `reencoded` lets pass; and the loss of PSNR to the
photo's own crop, against the autoencoder's round trip, by sampler and precision of key-I. No time
is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffveil import FaceKey, Inversion, Picture, Protector, RecoveryKey, generate_identity
from diffveil.cli.paths import find_photos
from diffveil.keychecks import compact
from diffveil.photos import encode_photo, load_photo
from diffveil.pictures import looks_like_one_of, picture_of
from diffveil.scenes import read_scenes, to_images

_INVERSIONS = (
    Inversion("o-belm", 8),
    Inversion("o-belm", 20),
    Inversion("bdia", 8),
    Inversion("ddim", 100),
)
_SIZES = {
    "this bundle": None,
    "Stable Diffusion 1.x": (768, 4, 64),
}


def crops_of(protector: Protector, folder: Path, count: int) -> NDArray[np.float32]:
    """The first faces of a folder, [N, 3, S, S] in [-1, 1]."""
    found: list[NDArray[np.uint8]] = []
    for photo in find_photos([str(folder)]):
        (scene,) = read_scenes(
            [photo.path],
            None,
            detect=protector.detector.detect,
            aligned=False,
            on_missing="keep",
            template=protector.bundle.template,
            size=protector.bundle.image_size,
        )
        found += list(scene.crops)
        if len(found) >= count:
            break
    return to_images(np.stack(found[:count]))


def psnr(images: NDArray[np.float32], crops: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each of [N, 3, S, S] in [-1, 1], in dB."""
    error = np.mean((images.astype(np.float64) - crops) ** 2, axis=(1, 2, 3))
    decibels: NDArray[np.float64] = 10 * np.log10(4 / error)
    return decibels


def losses(protector: Protector, crops: NDArray[np.float32]) -> Iterator[str]:
    """Rows of the first table."""
    operations = protector.operations
    faces = operations.prepare(crops)
    round_trip = np.clip(protector.programs.decode(latent=faces.latents), -1, 1)
    best = psnr(round_trip, crops)
    yield f"{len(crops)} faces; round trip {best.mean():.2f} dB\n"
    yield "| sampler | key-I | PSNR lost: mean | most | to the round trip |\n|---|---|---|---|---|"
    for inversion in _INVERSIONS:
        rounded = compact(faces.tokens).astype(np.float32)
        tokens, latents = operations.invert(faces, inversion, tokens=rounded)
        for name in ("float32", "float16"):
            kept = latents.astype(name).astype(np.float32)
            images = operations.recover(tokens, kept, inversion)
            lost = best - psnr(images, crops)
            near = psnr(images, round_trip).mean()
            yield (
                f"| {inversion.sampler}, {inversion.steps} steps | {name} | {lost.mean():.4f} dB "
                f"| {lost.max():.4f} dB | {near:.1f} dB |"
            )


def sealed_bytes(
    faces: int, sampler_latents: int, width: int, channels: int, side: int, dtype: str
) -> int:
    """Size of a key file of random numbers of these shapes, sealed to one recipient."""
    rng = np.random.default_rng(1)
    made = tuple(
        FaceKey(
            rng.standard_normal((10, width)).astype(np.float16),
            rng.standard_normal((sampler_latents, channels, side, side)).astype(dtype),
            np.eye(2, 3),
            (0.0, 0.0, 1.0, 1.0),
            rng.uniform(0, 1, (5, 2)),
            number,
        )
        for number in range(faces)
    )
    key = RecoveryKey(
        faces=made,
        bundle="0" * 64,
        sampler="ddim" if sampler_latents == 1 else "o-belm",
        steps=8,
        photo_size=(480, 640),
        pictures=(Picture(bytes(32), bytes(192)),),
        backend="cpu",
        precision="float32",
    )
    return len(key.seal_bytes(recipients=[generate_identity()[0]]))


def sizes(protector: Protector) -> Iterator[str]:
    """Rows of the second table."""
    d = protector.bundle.dimensions
    yield "| shapes of | latents | key-I | 1 face | 2 faces | 6 faces |\n|---|---|---|---|---|---|"
    for name, shape in _SIZES.items():
        shapes = shape or (d.token_width, d.latent_channels, d.latent_size)
        for latents in (2, 1):
            for dtype in ("float16", "float32"):
                counts = [sealed_bytes(n, latents, *shapes, dtype) for n in (1, 2, 6)]
                cells = " | ".join(f"{count:,}" for count in counts)
                yield f"| {name} | {latents} | {dtype} | {cells} |"


def alike(folder: Path) -> Iterator[str]:
    """How many photos the coarse colours take for another one, and for themselves as JPEG."""
    photos = [load_photo(found.path) for found in find_photos([str(folder)])[:100]]
    pictures = [picture_of(photo) for photo in photos]
    pairs = [
        looks_like_one_of([picture], photo)
        for i, picture in enumerate(pictures)
        for photo in photos[i + 1 :]
    ]
    yield f"{sum(pairs)} of {len(pairs)} pairs of different photos look alike"
    for quality in (90, 50, 20):
        copies = [load_photo(encode_photo(photo, "a.jpg", quality=quality)) for photo in photos]
        seen = [looks_like_one_of([p], c) for p, c in zip(pictures, copies, strict=True)]
        yield f"{sum(seen)} of {len(seen)} look like themselves as JPEG of quality {quality}"


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.keys", description=__doc__)
    parser.add_argument("photos", type=Path, metavar="PHOTOS")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--faces", type=int, default=40)
    args = parser.parse_args(argv)
    with Protector.load(args.bundle, threads=1) as protector:
        for row in sizes(protector):
            print(row, flush=True)
        print()
        for row in alike(args.photos):
            print(row, flush=True)
        print()
        for row in losses(protector, crops_of(protector, args.photos, args.faces)):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
