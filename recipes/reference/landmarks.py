"""Where the faces of training photos have their landmarks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from common import CENTER, CROP, nearest_face

from diffveil.cli.progress import ProgressBar
from diffveil.detectors import CenterFace
from diffveil.masks import turn

_FILE = "landmarks.npy"


class Finder:
    """Landmarks in the crops of training faces, detected once and kept in `landmarks.npy`.

    Args:
        faces: Training faces, uint8 [N, H, W, 3].
        offsets: Where each is cut, plain and mirrored, int [N, 2, 2].
        work: Folder of the file; a row of it is NaN where no face is found.

    Raises:
        SystemExit: The file is about other faces.
    """

    def __init__(self, faces: np.ndarray, offsets: np.ndarray, work: Path) -> None:
        self._offsets = offsets
        self._detector = CenterFace.load()
        file = work / _FILE
        if not file.exists():
            self._detect(faces, file)
        self._known = np.load(file)
        if len(self._known) != len(faces):
            sys.exit(f"{file} is about {len(self._known)} other faces, not {len(faces)}: remove it")

    def landmarks(self, row: int, flip: int) -> np.ndarray | None:
        """[5, 2] in the crop of a row, mirrored or not; None where no face is found."""
        found = self._known[row].astype(np.float64)
        if not np.isfinite(found).all():
            return None
        inner: np.ndarray = found - (CENTER + self._offsets[row, flip])[::-1]
        if flip:  # the crop is cut, then mirrored: left and right change places
            inner = inner[[1, 0, 2, 4, 3]]
            inner[:, 0] = CROP - 1 - inner[:, 0]
        return inner

    def turned(self, least: float) -> np.ndarray:
        """Which faces are turned, bool [N]: the nose lies so many eye distances off the middle."""
        return np.array([abs(turn(found)) > least for found in self._known.astype(np.float64)])

    def in_picture(self, pixels: np.ndarray) -> np.ndarray | None:
        """[5, 2] in a picture, uint8 [H, W, 3], of the face nearest to its middle."""
        found = self._detector.detect(pixels)
        middle = np.array(pixels.shape[1::-1]) / 2
        return nearest_face(found, middle).landmarks if found else None

    def _detect(self, faces: np.ndarray, file: Path) -> None:
        """Write the file, whole or not at all."""
        known = np.full((len(faces), 5, 2), np.nan, np.float32)
        with ProgressBar("landmarks") as bar:
            for row, pixels in enumerate(faces):
                found = self.in_picture(np.asarray(pixels))
                if found is not None:
                    known[row] = found
                bar(row + 1, len(faces))
        partial = file.with_suffix(".partial.npy")
        np.save(partial, known)
        os.replace(partial, file)
