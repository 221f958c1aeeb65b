"""Faces out of the photos that a command line names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffveil.bundle import Bundle
from diffveil.cli.paths import find_photos
from diffveil.cli.progress import ProgressBar
from diffveil.protector import Protector
from diffveil.scenes import read_scenes

__all__ = ["aligned_faces"]


def aligned_faces(
    paths: Sequence[str], bundle: Bundle, bar: ProgressBar, *, aligned: bool
) -> Iterator[NDArray[np.uint8]]:
    """Aligned faces of each photo, uint8 [F, S, S, 3]; photos without any are passed over.

    Args:
        paths: Photos and folders of photos.
        bundle: Says how faces are aligned.
        bar: Shows how many photos are done, and at the end how many showed no face.
        aligned: Each photo is one face, aligned already.

    Raises:
        PhotoError: A photo cannot be read.
    """
    photos = find_photos(paths)
    detector = None if aligned else Protector.load(bundle.path, backend="cpu").detector
    without = 0
    for index, photo in enumerate(photos):
        (scene,) = read_scenes(
            [Path(photo.path)],
            None,
            detect=(lambda _: ()) if detector is None else detector.detect,
            aligned=aligned,
            on_missing="keep",
            template=bundle.template,
            size=bundle.image_size,
        )
        bar(index + 1, len(photos))
        if len(scene.crops):
            yield scene.crops
        else:
            without += 1
    if without:
        bar.message(f"{without} of {len(photos)} photos show no face", sys.stderr)
