"""Where the faces of training photos have their landmarks."""

from __future__ import annotations

import numpy as np
from common import CENTER, CROP, nearest_face

from diffveil.detectors import CenterFace


class Finder:
    """Landmarks in the crops of training faces, detected when they are first asked for.

    Args:
        faces: Training faces, uint8 [N, H, W, 3].
        offsets: Where each is cut, plain and mirrored, int [N, 2, 2].
    """

    def __init__(self, faces: np.ndarray, offsets: np.ndarray) -> None:
        self._faces, self._offsets = faces, offsets
        self._detector = CenterFace.load()
        self._known: dict[int, np.ndarray | None] = {}

    def landmarks(self, row: int, flip: int) -> np.ndarray | None:
        """[5, 2] in the crop of a row, mirrored or not; None where no face is found."""
        if row not in self._known:
            self._known[row] = self.in_picture(np.asarray(self._faces[row]))
        found = self._known[row]
        if found is None:
            return None
        inner: np.ndarray = found - (CENTER + self._offsets[row, flip])[::-1]
        if flip:  # the crop is cut, then mirrored: left and right change places
            inner = inner[[1, 0, 2, 4, 3]]
            inner[:, 0] = CROP - 1 - inner[:, 0]
        return inner

    def in_picture(self, pixels: np.ndarray) -> np.ndarray | None:
        """[5, 2] in a picture, uint8 [H, W, 3], of the face nearest to its middle."""
        found = self._detector.detect(pixels)
        middle = np.array(pixels.shape[1::-1]) / 2
        return nearest_face(found, middle).landmarks if found else None
