"""Protects two photos that packages carry, recovers them from sealed keys, and draws the results.

    make demo                                   # or, where diffveil[cpu,faces] is installed:
    python examples/demo.py --output demo-output

The photos: NASA's portrait of the astronaut Eileen Collins (public domain; in scikit-image) and a
group of six (in insightface). Only their files are read; neither package is imported, so both can
be installed with `pip install --no-deps`.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import diffveil

PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png", "pip install --no-deps scikit-image"),
    "group": ("insightface", "data/images/t1.jpg", "pip install --no-deps insightface"),
}
COLUMNS = ("original", "anonymized", "hidden", "recovered")
PASSPHRASE = "a demo keeps no secrets"  # a real one comes from a prompt or a file
SEED = 5
PANEL = 640  # widest photo on a sheet, pixels
TILE = 224  # side of a face on its sheet, pixels
MARGIN, CAPTION = 12, 34  # pixels


def carried_photo(name: str) -> Path:
    """The path of a photo inside an installed package, found without importing the package."""
    package, file, install = PHOTOS[name]
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / file
        if path.is_file():
            return path
    sys.exit(f"The demo's photo '{name}' comes with a package that is not installed: {install}")


def timed(label: str, started: float) -> None:
    """Says how long a step took, in seconds."""
    print(f"  {label:<34}{time.perf_counter() - started:6.2f} s")


def protect_and_recover(
    protector: diffveil.Protector, name: str, folder: Path
) -> tuple[dict[str, Image.Image], tuple[diffveil.Face, ...]]:
    """One photo through all three verbs; the recovery reads nothing but files.

    Returns:
        The four pictures by column, and the faces found in the original.
    """
    with Image.open(carried_photo(name)) as source:
        original = source.convert("RGB")
    print(f"{name}: {original.width}x{original.height} pixels")

    started = time.perf_counter()
    anonymized = protector.anonymize(original, seed=SEED)
    timed(f"anonymize, {len(anonymized.faces)} face(s), and key", started)

    started = time.perf_counter()
    hidden = protector.hide(original, seed=SEED, make_key=False)
    timed("hide", started)

    photo_file, key_file = folder / f"{name}-anonymized.png", folder / f"{name}.veilkey"
    started = time.perf_counter()
    assert anonymized.key is not None
    anonymized.key.seal(key_file, passphrase=PASSPHRASE)
    anonymized.save(photo_file)
    hidden.save(folder / f"{name}-hidden.png")
    timed("seal the key, write the photos", started)

    started = time.perf_counter()
    key = diffveil.RecoveryKey.unseal(key_file, passphrase=PASSPHRASE)
    timed("unseal the key", started)

    started = time.perf_counter()
    recovered = protector.recover(photo_file, key)
    timed("recover", started)
    recovered.save(folder / f"{name}-recovered.png")

    try:
        diffveil.RecoveryKey.unseal(key_file, passphrase="somebody else's guess")
    except diffveil.WrongSecretError as error:
        print(f"  a wrong passphrase: {error}")
    pictures = (original, anonymized.image, hidden.image, recovered.image)
    return dict(zip(COLUMNS, pictures, strict=True)), anonymized.faces


def sheet(rows: list[list[Image.Image]], captions: tuple[str, ...]) -> Image.Image:
    """Pictures of one size in rows, with a caption above every column."""
    width, height = rows[0][0].size
    canvas = Image.new(
        "RGB",
        (
            MARGIN + len(captions) * (width + MARGIN),
            CAPTION + len(rows) * (height + MARGIN),
        ),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=18)
    for column, caption in enumerate(captions):
        left = MARGIN + column * (width + MARGIN)
        draw.text((left + width / 2, CAPTION / 2), caption, fill="black", font=font, anchor="mm")
        for row, pictures in enumerate(rows):
            canvas.paste(pictures[column], (left, CAPTION + row * (height + MARGIN)))
    return canvas


def photo_row(pictures: dict[str, Image.Image]) -> list[Image.Image]:
    """The four pictures, no wider than a panel."""
    original = pictures["original"]
    scale = min(1.0, PANEL / original.width)
    size = (round(original.width * scale), round(original.height * scale))
    return [
        pictures[column].convert("RGB").resize(size, Image.Resampling.LANCZOS) for column in COLUMNS
    ]


def face_rows(
    pictures: dict[str, Image.Image], faces: tuple[diffveil.Face, ...]
) -> list[list[Image.Image]]:
    """One row a face: a square around its box, enlarged."""
    rows = []
    for face in faces:
        x0, y0, x1, y1 = face.box
        half = 0.65 * max(x1 - x0, y1 - y0)
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        area = (round(x - half), round(y - half), round(x + half), round(y + half))
        rows.append(
            [
                pictures[column]
                .convert("RGB")
                .crop(area)
                .resize((TILE, TILE), Image.Resampling.LANCZOS)
                for column in COLUMNS
            ]
        )
    return rows


def main() -> int:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="FOLDER")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    protector = diffveil.Protector.load()
    print("embedded bundle")
    timed("load", started)

    written = []
    for name in PHOTOS:
        pictures, faces = protect_and_recover(protector, name, folder)
        for kind, rows in (
            ("side-by-side", [photo_row(pictures)]),
            ("faces", face_rows(pictures, faces)),
        ):
            written.append(folder / f"{name}-{kind}.png")
            sheet(rows, COLUMNS).save(written[-1])

    print("\nLook at:")
    for path in written:
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
