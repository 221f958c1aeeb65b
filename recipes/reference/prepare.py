"""Pack a folder of aligned faces into one array for training, people held out for measuring.

    python recipes/reference/prepare.py FACES -o .work/reference

FACES is a folder of 160×160 images whose pixels 24…136 are the ArcFace 112×112 crop; below it,
`index.csv` files may name a `person_group` for each file: photos of a held-out group never enter
training. Writes `train.npy` (uint8 [N, 160, 160, 3] RGB), `train.txt` (one name a row) and
`heldout/<person>/<photo>.png`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

HELD_OUT_PEOPLE = 40
SIZE = 160


def held_out_groups(rows: list[dict[str, str]]) -> set[str]:
    """Pick the groups by hash of their name: reproducible, and blind to how faces look."""
    sizes: dict[str, int] = defaultdict(int)
    for row in rows:
        sizes[row["person_group"]] += 1
    usable = [g for g, n in sizes.items() if 8 <= n < 100]
    usable.sort(key=lambda g: hashlib.sha256(f"heldout/{g}".encode()).digest())
    return set(usable[:HELD_OUT_PEOPLE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("faces", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path(".work/reference"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    group_of: dict[Path, str] = {}
    identity_of: dict[Path, str] = {}
    for index in sorted(args.faces.rglob("index.csv")):
        with index.open() as handle:
            for row in csv.DictReader(handle):
                stem = Path(row["file"]).stem
                path = index.parent / row["celeba_identity"] / f"{stem}.webp"
                group_of[path], identity_of[path] = row["person_group"], row["celeba_identity"]
        held = held_out_groups([{"person_group": g} for g in group_of.values()])
    files = sorted(p for p in args.faces.rglob("*") if p.suffix in {".webp", ".png", ".jpg"})
    train = [p for p in files if group_of.get(p) not in held] if group_of else files
    for path in set(files) - set(train):
        target = args.out / "heldout" / identity_of[path] / f"{path.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(target)

    array = np.lib.format.open_memmap(
        args.out / "train.npy", mode="w+", dtype=np.uint8, shape=(len(train), SIZE, SIZE, 3)
    )

    def load(i: int) -> None:
        array[i] = np.asarray(Image.open(train[i]).convert("RGB"))

    with ThreadPoolExecutor() as pool:
        list(pool.map(load, range(len(train))))
    array.flush()
    (args.out / "train.txt").write_text("".join(f"{p.relative_to(args.faces)}\n" for p in train))
    print(f"{len(train)} faces to train on, {len(files) - len(train)} held out")


if __name__ == "__main__":
    main()
