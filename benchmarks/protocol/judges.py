"""Recognizers as judges: photos or aligned crops in, embeddings out, with what they had to do with
the bundle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import diffveil
from benchmarks._recognizers import ARCFACE_TEMPLATE, load_recognizer
from benchmarks.protocol.people import Pixels, Portrait
from benchmarks.protocol.verification import Gallery
from diffveil.align import crop_face, similarity
from diffveil.scenes import to_images

__all__ = ["Judge", "load_judges"]

Array = NDArray[np.float32]

INDEPENDENT = "independent"
DISTILLED = "distilled from"
GUIDED = "guided against"

_BATCH = 32


@dataclass(eq=False)
class Judge:
    """One recognizer.

    Attributes:
        name: Shown in tables.
        kind: `independent`: had no part in the bundle; `distilled from`: taught the bundle's own
            recognizer; `guided against`: the bundle's own recognizer.
        embed: Crops uint8 [N, size, size, 3] to unit embeddings [N, E].
        template: Landmarks in those crops, [5, 2].
        size: Side of those crops in pixels.
        frame: Template of the bundle's aligned crops.
        vectors: Embeddings [N, E] of the portraits, by operation; filled by `look`.
    """

    name: str
    kind: str
    embed: Callable[[Pixels], Array]
    template: NDArray[np.float64]
    size: int
    frame: NDArray[np.float64]
    vectors: dict[str, Array] = field(default_factory=dict)
    gallery: Gallery = field(init=False)

    @property
    def independent(self) -> bool:
        """Whether it had no part in the bundle."""
        return self.kind == INDEPENDENT

    def of_photos(self, portraits: list[Portrait], operation: str) -> Array:
        """Embeddings [N, E] of what an operation made of the photos."""
        return self.embed(
            np.stack([p.crop(operation, self.template, self.size) for p in portraits])
        )

    def of_crops(self, crops: Pixels) -> Array:
        """Embeddings [N, E] of the bundle's aligned crops, uint8 [N, S, S, 3]."""
        matrix = similarity(self.frame, self.template)
        return self.embed(np.stack([crop_face(crop, matrix, self.size) for crop in crops]))

    def of_the_first(self, rows: list[int]) -> Judge:
        """The same recognizer with these rows of its gallery moved to the front."""
        rest = sorted(set(range(len(self.gallery.embeddings))) - set(rows))
        order = np.array([*rows, *rest])
        judge = copy.copy(self)
        judge.gallery = self.gallery.ordered(order)
        judge.vectors = {}
        return judge

    def look(self, portraits: list[Portrait], gallery: list[Portrait], kinds: list[str]) -> None:
        """Embed the gallery's originals and every kind of output.

        Args:
            portraits: Those with outputs; the gallery begins with them.
            gallery: All photos whose originals are known.
            kinds: Names of outputs.
        """
        known = self.of_photos(gallery, "original")
        self.gallery = Gallery(known, [p.person for p in gallery])
        self.vectors = {"original": known[: len(portraits)]}
        for kind in kinds:
            self.vectors[kind] = self.of_photos(portraits, kind)


def load_judges(
    protector: diffveil.Protector, files: Mapping[str, Path], independent: set[str]
) -> list[Judge]:
    """Recognizers given as files, and the bundle's own last.

    Raises:
        ValueError: A file is neither ONNX nor TorchScript.
    """
    frame, size = np.asarray(protector.bundle.template), protector.bundle.image_size

    def own(crops: Pixels) -> Array:
        images = to_images(crops)
        return np.concatenate(
            [
                protector.operations.embed(images[i : i + _BATCH])
                for i in range(0, len(images), _BATCH)
            ]
        )

    judges = [
        Judge(
            name,
            INDEPENDENT if name in independent else DISTILLED,
            load_recognizer(path),
            ARCFACE_TEMPLATE,
            112,
            frame,
        )
        for name, path in files.items()
    ]
    return [*judges, Judge("bundle", GUIDED, own, frame, size, frame)]
