"""Who is whom after pseudonyms and after hiding: what stays linkable, and to whom.

    python -m benchmarks.identities PEOPLE --recognizer NAME=FILE… [--independent NAME=FILE…]

PEOPLE and recognizers are those of `benchmarks.quality`. The first photo of each person is
enrolled, the following ones are probes. Rates are shares of pairs whose cosine exceeds that of
`--far` of the impostor pairs of original photos. Measured are

* pseudonyms: how often a probe is taken for its own person; whether two photos of a person become
  the same new face, photos of two people different ones, and the new face is not the old one;
  whether photos protected under two secrets can be linked;
* hide: whether a hidden probe matches the person's enrolled photo, by the bundle's recognizer (the
  authorised one, through `Protector.embed`) and by the others.

Writes `identities.json` and `identities.png` to `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import diffveil
from benchmarks._recognizers import ARCFACE_TEMPLATE, load_recognizer
from benchmarks.protocol.people import Portrait, add_arguments, load_people, named_files
from diffveil.align import crop_face, similarity
from diffveil.detectors import CenterFace
from diffveil.pseudonyms import code_of, nearest

F32: TypeAlias = NDArray[np.float32]
Pixels: TypeAlias = NDArray[np.uint8]
SECRETS = bytes(range(32)), bytes(range(1, 33))
_TOGETHER = 12


def protected(
    protector: diffveil.Protector, portraits: list[Portrait], operation: str, **options: Any
) -> list[Pixels]:
    """The photos after an operation, some at a time."""
    photos: list[Pixels] = []
    for start in range(0, len(portraits), _TOGETHER):
        part = portraits[start : start + _TOGETHER]
        results = getattr(protector, operation)(
            [p.pixels for p in part], faces=[[p.face] for p in part], make_key=False, **options
        )
        photos += [np.asarray(result) for result in results]
    return photos


def arcface(portraits: list[Portrait], photos: list[Pixels]) -> Pixels:
    """Crops by the original's landmarks, uint8 [N, 112, 112, 3]."""
    return np.stack(
        [
            crop_face(photo, similarity(p.face.landmarks, ARCFACE_TEMPLATE), 112)
            for p, photo in zip(portraits, photos, strict=True)
        ]
    )


class Pairs:
    """Rates at which a recognizer takes pairs of photos for one person.

    Args:
        enrolled: Embeddings of the enrolled photos, one a person.
        originals: Embeddings of the probes before protection.
        labels: Person of each probe, an index into `enrolled`.
        far: Share of impostor pairs that are accepted.
    """

    def __init__(self, enrolled: F32, originals: F32, labels: NDArray[np.intp], far: float) -> None:
        self.enrolled, self.originals, self.labels = enrolled, originals, labels
        everyone = np.concatenate([enrolled, originals])
        who = np.concatenate([np.arange(len(enrolled)), labels])
        cosines = (everyone @ everyone.T)[np.triu(who[:, None] != who, 1)]
        self.threshold = float(np.quantile(cosines, 1 - far))
        self.same = labels[:, None] == labels
        self.other = self.same & ~np.eye(len(labels), dtype=bool)

    def rate(self, a: F32, b: F32, pairs: NDArray[np.bool_]) -> float:
        """Share of these pairs of rows that are accepted."""
        accepted: NDArray[np.bool_] = (a @ b.T)[pairs] > self.threshold
        return float(accepted.mean())

    def to_enrolled(self, probes: F32) -> float:
        """Share of probes accepted for their own person's enrolled photo."""
        return float(((probes * self.enrolled[self.labels]).sum(1) > self.threshold).mean())

    def pseudonyms(self, a: F32, b: F32, agree: NDArray[np.bool_]) -> dict[str, float]:
        """Under two secrets, a and b; `agree`: pairs of probes with one code."""
        itself = np.eye(len(a), dtype=bool)
        return {
            "originals_same_person": self.rate(self.originals, self.originals, self.other),
            "same_person": self.rate(a, a, self.other),
            "same_person_same_code": self.rate(a, a, self.other & agree),
            "different_people": self.rate(a, a, ~self.same),
            "own_original": self.rate(a, self.originals, itself),
            "enrolled_original": self.to_enrolled(a),
            "two_secrets_same_photo": self.rate(a, b, itself),
            "two_secrets_same_person": self.rate(a, b, self.same),
            "two_secrets_different_people": self.rate(a, b, ~self.same),
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--max-people", type=int, default=13)
    parser.add_argument("--probes", type=int, default=3, help="photos a person beside the enrolled")
    parser.add_argument("--far", type=float, default=0.01)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("identities"))
    args = parser.parse_args(argv)

    named = named_files([*args.recognizer, *args.independent])
    protector = diffveil.Protector.load(args.bundle, threads=args.threads)
    detector = CenterFace.load(threads=args.threads)
    everyone, _ = load_people(args.people, args.max_people, 1 + args.probes, detector)
    first: dict[str, Portrait] = {}
    for portrait in everyone:
        first.setdefault(portrait.person, portrait)
    enrolled = list(first.values())
    probes = [p for p in everyone if p not in enrolled]
    labels = np.array([list(first).index(p.person) for p in probes])

    def own(portraits: list[Portrait], photos: list[Pixels]) -> F32:
        found = protector.embed(photos, faces=[[p.face] for p in portraits])
        return np.concatenate([one.embeddings for one in found])

    people = dict(zip(first, own(enrolled, [p.pixels for p in enrolled]), strict=True))
    before = own(probes, [p.pixels for p in probes])
    codes = nearest(before, people, protector.bundle.thresholds.get("0.01", 0.4))
    known = [code_of(name) for name in people]
    right = np.array([code == known[label] for code, label in zip(codes, labels, strict=True)])
    wrong = np.array([code in known for code in codes]) & ~right
    agree = np.array([[a == b for b in codes] for a in codes])

    photos = {
        name: protected(protector, probes, "anonymize", pseudonym=secret, people=people)
        for name, secret in zip(("one", "two"), SECRETS, strict=True)
    }
    photos["hidden"] = protected(protector, probes, "hide", seed=0)

    report: dict[str, Any] = {
        "bundle": protector.bundle.name,
        "fingerprint": protector.bundle.fingerprint,
        "people": len(enrolled),
        "probes": len(probes),
        "far": args.far,
        "taken_for_own_person": float(right.mean()),
        "taken_for_another": float(wrong.mean()),
        "pairs_with_one_code": float(
            agree[(labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool)].mean()
        ),
        "recognizers": {},
    }

    def judge(name: str, embed: Any, independent: bool) -> None:
        pairs = Pairs(
            embed(enrolled, [p.pixels for p in enrolled]),
            embed(probes, [p.pixels for p in probes]),
            labels,
            args.far,
        )
        seen = {kind: embed(probes, made) for kind, made in photos.items()}
        itself = np.eye(len(probes), dtype=bool)
        report["recognizers"][name] = {
            "independent": independent,
            "threshold": pairs.threshold,
            "pseudonyms": pairs.pseudonyms(seen["one"], seen["two"], agree),
            "hide": {
                "own_original": pairs.rate(seen["hidden"], pairs.originals, itself),
                "enrolled_original": pairs.to_enrolled(seen["hidden"]),
                "enrolled_original_unprotected": pairs.to_enrolled(pairs.originals),
                "cosine": float((seen["hidden"] * pairs.originals).sum(1).mean()),
            },
        }
        print(name, json.dumps(report["recognizers"][name], indent=1), flush=True)

    judge("bundle", own, False)
    for name, path in named.items():
        recognizer = load_recognizer(path)
        judge(
            name,
            lambda portraits, made, see=recognizer: see(arcface(portraits, made)),
            name in named_files(args.independent),
        )

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "identities.json").write_text(json.dumps(report, indent=1) + "\n")
    shown = range(min(12, len(probes)))
    rows = [
        [probes[i].pixels for i in shown],
        *[[made[i] for i in shown] for made in photos.values()],
    ]
    sheet = [
        np.concatenate([np.asarray(Image.fromarray(c).resize((128, 128))) for c in row], axis=1)
        for row in rows
    ]
    Image.fromarray(np.concatenate(sheet)).save(args.out / "identities.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
