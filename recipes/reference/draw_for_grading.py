"""Draw training people's faces, and write them on numbered sheets for people to grade.

    python recipes/reference/draw_for_grading.py anonymize --count 2400 --seed 101

Needs the faces that prepare.py gathered, and a bundle. Faces come out as the preset draws them at
first, nobody having looked at them. Writes a folder `grading/VERB-SEED` with, for every 48 faces,
`NNN.npz` (`drawn`, float16 [48, 3, 128, 128] in [-1, 1], put into their photos; `rows` of
`train.npy`) and `NNN.png`, the sheet; and `drawn.json`, what they were drawn by. Sheets that are
there are kept.

How to grade: look at the face between brows and chin, not at what is around it.
    0  broken: at a glance an eye, nose or mouth is missing, doubled, smeared or out of its place
    1  doubtful: odd on a second look, yet a face
    2  good: passes as a small photograph of somebody
With `--draws 8` every row of a sheet is one photo's face, drawn eight times: such grades tell a
judge what makes one draw better than another of the same photo.
`grades.json` holds the grades: for each such folder what it was drawn by, and for each grader one
string of digits, a digit a face, with a dot where none was given; `best` is the highest digit where
it is not 2, as for grades in halves, which are written down twofold; `level` is the mean grade,
0 … 1, that such faces get where they stand among those of before: graders compare what they see.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent))
from common import in_whole_photos, load_faces, load_names, nearest_face

from diffveil.bundle import Bundle
from diffveil.cli.progress import ProgressBar
from diffveil.detectors import CenterFace
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.photos import load_photo
from diffveil.plans import Plan
from diffveil.presets import preset
from diffveil.scenes import Scene

SHEET = 48
_COLUMNS, _CELL = 8, (138, 152)
_CELEBA = 0.6  # share of faces that stand in a whole photo; others are mirrored at their borders


def described(
    bundle: Bundle, verb: str, name: str, plan: Plan, seed: int, draws: int
) -> dict[str, Any]:
    """What decides how the faces look, so that grades are not taken for other faces'."""
    few = bundle.manifest.programs.get("denoise_few", bundle.program("denoise"))
    weights = {name: bundle.manifest.files[name].sha256 for name in few.data}
    text = json.dumps([repr(plan), few.file.sha256, weights], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    facts = {"verb": verb, "preset": name, "seed": seed, "drawn_by": digest}
    return facts if draws == 1 else facts | {"draws": draws}


def rows_to_draw(names: list[str], seed: int) -> Iterator[int]:
    """Rows of the training faces, in an order that the seed gives."""
    whole = in_whole_photos(names)
    rng = np.random.default_rng(seed)
    first = rng.random(2 * len(names)) < _CELEBA
    a = iter(rng.permutation(np.flatnonzero(whole)))
    b = iter(rng.permutation(np.flatnonzero(~whole)))
    for one in first:
        row = next(a if one else b, None)
        if row is None:
            return
        yield int(row)


def cut_faces(faces: np.ndarray, rows: Iterator[int], bundle: Bundle) -> Iterator[Any]:
    """Row, crop [3, S, S] in [-1, 1] and landmarks in it of every face that the detector finds."""
    detector = CenterFace.load()
    middle = np.full(2, faces.shape[1] / 2)
    for row in rows:
        photo = load_photo(np.asarray(faces[row]))
        found = detector.detect(photo.pixels)
        if not found:
            continue
        one = nearest_face(found, middle)
        scene = Scene.cut(photo, [one], bundle.template, bundle.image_size)
        crop = scene.crops[0].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        yield row, crop, scene.landmarks[0]


def sheet(faces: np.ndarray, first: int) -> Image.Image:
    """Faces [48, 3, S, S], each below its number."""
    width, height = _CELL
    page = Image.new("RGB", (_COLUMNS * width, -(-len(faces) // _COLUMNS) * height), "white")
    pen = ImageDraw.Draw(page)
    for i, face in enumerate(faces):
        x, y = i % _COLUMNS * width + 5, i // _COLUMNS * height
        pixels = ((face.transpose(1, 2, 0) + 1) * 127.5).clip(0, 255).astype(np.uint8)
        page.paste(Image.fromarray(pixels), (x, y + 16))
        pen.text((x + 50, y + 3), str(first + i), fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("verb", choices=["anonymize", "hide"])
    parser.add_argument("--work", type=Path, default=Path(".work/reference"))
    parser.add_argument("--bundle", default="runtime/diffveil/bundles/reference-128")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--count", type=int, default=960, help="faces (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=1, help="of each photo, one after another")
    args = parser.parse_args()
    if args.draws < 1 or SHEET % args.draws:
        parser.error(f"--draws is {args.draws}, expected a divisor of {SHEET}, faces of a sheet")

    bundle = Bundle.load(args.bundle)
    plan = replace(getattr(preset(args.preset), args.verb), accept=None, natural=0.0, redraws=0)
    folder = args.work / "grading" / f"{args.verb}-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    facts = described(bundle, args.verb, args.preset, plan, args.seed, args.draws)
    record = folder / "drawn.json"
    if record.exists() and json.loads(record.read_text()) != facts:
        sys.exit(f"{folder} holds faces that other weights or another plan drew: put it aside")
    record.write_text(json.dumps(facts, indent=1) + "\n")

    names = load_names(args.work)
    cuts = cut_faces(load_faces(args.work), rows_to_draw(names, args.seed), bundle)
    with ProgressBar("faces") as bar, Programs(bundle, ONNXRuntimeCPU()) as programs:
        operations = FaceOperations(programs)
        for start in range(0, args.count, SHEET):
            one_each = [next(cuts) for _ in range(SHEET // args.draws)]
            several = (cut for cut in one_each for _ in range(args.draws))
            rows, crops, landmarks = zip(*several, strict=True)
            file = folder / f"{start // SHEET:03d}.npz"
            if not file.exists():
                faces = operations.prepare(np.stack(crops), np.stack(landmarks))
                keys = [NoiseKey.from_seed(1_000_000 * args.seed + start + i) for i in range(SHEET)]
                drawn = getattr(operations, args.verb)(faces, plan, keys=keys)[:, 0]
                whole = faces.crops + faces.pixel_masks * (drawn - faces.crops)
                placed = whole.astype(np.float16)
                sheet(placed.astype(np.float32), start).save(file.with_suffix(".png"))
                with file.with_suffix(".partial").open("wb") as stream:
                    np.savez(stream, drawn=placed, rows=np.array(rows))
                file.with_suffix(".partial").replace(file)
            bar(min(start + SHEET, args.count), args.count)


if __name__ == "__main__":
    main()
