"""What determined observers of anonymized faces regain: the figures behind the threat model.

    python -m benchmarks.adversary PEOPLE --train FOLDER --independent NAME=FILE…

PEOPLE holds `person/photo.jpg` of people that no training saw; FOLDER the same of other people: a
person of both would teach the attacker the answers, and one under two names would count as an
impostor. Every attacker uses the recognizers given. It sets its own threshold, at FAR 1 % of its
own impostor pairs: an attacker may choose, unlike the operator of an existing system.

- *match*: anonymized faces against original photos of the same people.
- *link*: anonymized photos of one person against each other. That finds out who appears twice, not
  who it is.
- *purify*: noise is added to the anonymized face and removed again by the bundle's own diffusion
  model, which might wash guidance out; then as *match*.
- *learn*: with pairs of anonymized and original faces of other people at hand, a linear map from
  what the recognizer says of the one to what it says of the other; then as *match*.

Beside ours stand two covers: the face blurred, and an ellipse of plain grey in its place. Grey has
no face at all, so what is regained from it comes from hair, build and background.

Writes `adversary.json` to `--out`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

import diffveil
from benchmarks._recognizers import ARCFACE_TEMPLATE, load_recognizer
from benchmarks.protocol.people import Pixels, add_arguments, load_people, named_files
from benchmarks.protocol.tables import insert
from diffveil.align import crop_face, similarity
from diffveil.detectors import CenterFace
from diffveil.masks import face_mask
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.plans import Guidance, Plan
from diffveil.presets import preset
from diffveil.scenes import to_images, to_pixels

FAR = 0.01
_BATCH = 8

F32 = NDArray[np.float32]
Embed = Callable[[Pixels], F32]


def rates(scores: F32, same: NDArray[np.bool_], far: float = FAR) -> tuple[float, float]:
    """An attacker's true accept rate and threshold.

    Args:
        scores: Cosine of every probe with every reference, float32 [N, M].
        same: Whether they are of the same person, [N, M]; pairs to leave out are in neither set,
            as they are NaN in `scores`.
        far: Share of impostor pairs that the attacker puts up with.
    """
    known = ~np.isnan(scores)
    threshold = float(np.quantile(scores[~same & known], 1 - far))
    return float((scores[same & known] > threshold).mean()), threshold


def linear_map(seen: F32, meant: F32, ridge: float = 1.0) -> F32:
    """The matrix [E, E] that best takes embeddings `seen` [N, E] to `meant` [N, E]."""
    gram = seen.T @ seen + ridge * np.eye(seen.shape[1], dtype=np.float32)
    solved: F32 = np.linalg.solve(gram, seen.T @ meant)
    return solved


def unit(vectors: F32) -> F32:
    """Vectors [N, E] of length one."""
    scaled: F32 = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


# Unguided and unconditional: what the model by itself makes of a slightly noised face.
_PURIFY = Plan(
    sampler="ddim",
    steps=30,
    strength=0.3,
    conditional_above=1000,
    background_below=0,
    guidance=Guidance(weight=((-1, 0.0),), mode="repel"),
    spacing="trailing",
)


def remade(
    operations: FaceOperations,
    crops: Pixels,
    landmarks: NDArray[np.float64],
    plan: Plan,
    seed: int,
) -> Pixels:
    """Crops [N, S, S, 3] with the faces that a plan makes, each with noise of its own."""
    parts = []
    for start in range(0, len(crops), _BATCH):
        part = slice(start, start + _BATCH)
        images = to_images(crops[part])
        faces = operations.prepare(images, landmarks[part])
        keys = [NoiseKey.from_seed(seed + start + i) for i in range(len(images))]
        drawn = operations.anonymize(faces, plan, keys=keys)[:, 0]
        parts.append(to_pixels(images + faces.pixel_masks * (drawn - images)))
        print(f"{start + len(images)}/{len(crops)} faces", file=sys.stderr, flush=True)
    return np.concatenate(parts)


def blurred(crops: Pixels) -> Pixels:
    """Crops [N, S, S, 3] blurred by a tenth of their size."""
    radius = ImageFilter.GaussianBlur(crops.shape[1] / 10)
    return np.stack([np.asarray(Image.fromarray(crop).filter(radius)) for crop in crops])


def greyed(crops: Pixels, mask: F32) -> Pixels:
    """Crops [N, S, S, 3] with plain grey where the mask [S, S] says that the face is."""
    weight = mask[..., None]
    return (crops * (1 - weight) + 127 * weight).astype(np.uint8)


def attacks(
    embed: Embed, faces: dict[str, Pixels], people: list[str]
) -> dict[str, dict[str, float]]:
    """True accept rate of every attack by one recognizer, and the threshold it chose.

    Args:
        embed: Crops [N, S, S, 3] to unit embeddings [N, E].
        faces: `original` and `anonymized` of the same photos, perhaps `purified` too; `train
            original` and `train anonymized` of other people's.
        people: Person of each photo.
    """
    vectors = {name: embed(crops) for name, crops in faces.items()}
    labels = np.unique(people, return_inverse=True)[1]
    same = labels[:, None] == labels[None, :]
    itself = np.eye(len(labels), dtype=bool)
    original, hidden = vectors["original"], vectors["anonymized"]
    learned = linear_map(vectors["train anonymized"], vectors["train original"])
    # Probes, references, and which of the pairs of one person do not count.
    trials = {
        "originals, other photos": (original, original, itself),
        "match, the same photo": (hidden, original, same & ~itself),
        "match, other photos": (hidden, original, itself),
        "link": (hidden, hidden, itself),
        "learn, other photos": (unit(hidden @ learned), original, itself),
    }
    if "purified" in vectors:
        trials["purify, other photos"] = (vectors["purified"], original, itself)
    found = {}
    for name, (probe, reference, ignored) in trials.items():
        scores = np.where(ignored, np.nan, probe @ reference.T)
        rate, threshold = rates(scores, same)
        found[name] = {"tar": rate, "threshold": threshold}
    return found


def as_markdown(report: dict[str, Any]) -> str:
    """A row an attack, a column a recognizer and cover."""
    columns = [
        (name, cover, rows)
        for name, covers in report["recognizers"].items()
        for cover, rows in covers.items()
    ]
    lines = [
        f"TAR at FAR 1 %, the attacker's own threshold; {report['faces']} photos of "
        f"{report['people']} people, preset `{report['preset']}`; {report['train_faces']} pairs "
        "of other people to learn from.",
        "",
        "| attack | " + " | ".join(f"{name}: {cover}" for name, cover, _ in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for attack in columns[0][2]:
        cells = [f"{rows[attack]['tar']:.1%}" if attack in rows else "" for *_, rows in columns]
        lines.append(f"| {attack} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--train", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--preset", default="fast")
    parser.add_argument(
        "--unconditional",
        action="store_true",
        help="do not show the diffusion model the photo's own embedding (conditional_above=1000)",
    )
    parser.add_argument("--max-people", type=int, default=40)
    parser.add_argument("--photos", type=int, default=3, help="at most so many of each person")
    parser.add_argument("--train-people", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("adversary"))
    parser.add_argument("--document", type=Path, help="Markdown file whose table to replace")
    args = parser.parse_args(argv)

    named = named_files([*args.recognizer, *args.independent])
    if not named:
        parser.error("give at least one --recognizer or --independent")
    protector, detector = diffveil.Protector.load(args.bundle), CenterFace.load()
    template, size = np.asarray(protector.bundle.template), protector.bundle.image_size
    plan, operations = preset(args.preset).anonymize, protector.operations
    if args.unconditional:
        plan = replace(plan, conditional_above=1000)

    mask = face_mask(size, protector.bundle.template)
    covers: dict[str, Callable[[Pixels, NDArray[np.float64], int], Pixels]] = {
        "ours": lambda crops, points, seed: remade(operations, crops, points, plan, seed),
        "blur": lambda crops, *_: blurred(crops),
        "grey": lambda crops, *_: greyed(crops, mask),
    }
    faces: dict[str, dict[str, Pixels]] = {cover: {} for cover in covers}
    people: list[str] = []
    landmarks: dict[str, NDArray[np.float64]] = {}
    sets = (("", args.people, args.max_people), ("train ", args.train, args.train_people))
    for prefix, folder, count in sets:
        portraits, _ = load_people(folder, count, args.photos, detector)
        if len({p.person for p in portraits}) < 2:
            parser.error(f"{folder}: expected person/photo.jpg of at least two people")
        crops = np.stack([p.crop("original", template, size) for p in portraits])
        landmarks[prefix] = np.stack([p.landmarks(template) for p in portraits])
        people = people or [p.person for p in portraits]
        for cover, change in covers.items():
            faces[cover][f"{prefix}original"] = crops
            faces[cover][f"{prefix}anonymized"] = change(
                crops, landmarks[prefix], 10**5 * len(faces[cover])
            )
    ours = faces["ours"]
    ours["purified"] = remade(operations, ours["anonymized"], landmarks[""], _PURIFY, seed=10**6)

    to_arcface = similarity(template, ARCFACE_TEMPLATE)
    report: dict[str, Any] = {
        "faces": len(people),
        "people": len(set(people)),
        "train_faces": len(ours["train original"]),
        "bundle": protector.bundle.name,
        "fingerprint": protector.bundle.fingerprint,
        "preset": args.preset,
        "unconditional": args.unconditional,
        "backend": protector.backend,
        "machine": platform.machine(),
        "far": FAR,
        "recognizers": {},
    }
    for name, path in named.items():
        network = load_recognizer(path)

        def embed(crops: Pixels, network: Embed = network) -> F32:
            return network(np.stack([crop_face(crop, to_arcface, 112) for crop in crops]))

        report["recognizers"][name] = {
            cover: attacks(embed, crops, people) for cover, crops in faces.items()
        }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "adversary.json").write_text(json.dumps(report, indent=1) + "\n")
    if args.document:
        insert(args.document, as_markdown(report), "adversary")
    print(as_markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
