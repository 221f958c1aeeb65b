"""Photos of people, their faces, and what the operations made of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffveil.align import crop_face, in_crop, similarity
from diffveil.faces import Face, FaceDetector
from diffveil.photos import load_photo

__all__ = [
    "SUFFIXES",
    "Pixels",
    "Portrait",
    "add_arguments",
    "central_face",
    "load_people",
    "named_files",
    "strangers",
]

Pixels = NDArray[np.uint8]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(eq=False)
class Portrait:
    """One photo of a person, its face, and what the operations made of it."""

    person: str
    pixels: Pixels
    face: Face
    outputs: dict[str, Pixels] = field(default_factory=dict)
    file: str = ""
    """Path below the folder of people, `person/photo.jpg`."""

    def crop(self, operation: str, template: NDArray[np.float64], size: int) -> Pixels:
        """The output's face, cut out by the landmarks of the original."""
        source = self.outputs.get(operation, self.pixels)
        return crop_face(source, similarity(self.face.landmarks, template), size)

    def landmarks(self, template: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where the face's landmarks lie in its crops, float64 [5, 2]."""
        return in_crop(self.face.landmarks, similarity(self.face.landmarks, template))


def central_face(pixels: Pixels, detector: FaceDetector) -> Face | None:
    """The face nearest the photo's centre: its subject; a bystander may score higher."""
    centre = np.array(pixels.shape[1::-1]) / 2
    return min(
        detector.detect(pixels),
        key=lambda face: float(np.linalg.norm(face.landmarks.mean(0) - centre)),
        default=None,
    )


def load_people(
    root: Path, people: int, photos: int, detector: FaceDetector
) -> tuple[list[Portrait], int]:
    """Portraits of up to `people` people, and the number of photos without a face."""
    portraits, missed = [], 0
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    for folder in folders[:people]:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        for path in files[:photos]:
            pixels = load_photo(path).pixels
            face = central_face(pixels, detector)
            if face is None:
                missed += 1
                continue
            name = path.relative_to(root).as_posix()
            portraits.append(Portrait(folder.name, pixels, face, file=name))
    return portraits, missed


def strangers(people: list[str]) -> NDArray[np.intp]:
    """For each face a face of another person, [N]: the next one in the list, round its end."""
    count = len(people)
    return np.array(
        [
            next(j % count for j in range(i + 1, i + count) if people[j % count] != person)
            for i, person in enumerate(people)
        ]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare whose photos to measure, who judges them, and the bundle."""
    parser.add_argument("people", type=Path, metavar="PEOPLE")
    parser.add_argument("--recognizer", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--independent", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--bundle", type=Path)


def named_files(values: Iterable[str]) -> dict[str, Path]:
    """Files by name, of arguments NAME=FILE."""
    return {name: Path(path) for name, _, path in (v.partition("=") for v in values)}
