"""Where the faces of training photos have their landmarks, and who sees where drawn ones have."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import CENTER, CROP, nearest_face
from torch import nn
from torch.nn import functional as F

from diffveil.detectors import CenterFace

_FILE = "landmarks.npy"
_HELD = 28  # side of the maps on which the reader looks for landmarks


class Finder:
    """Landmarks in the crops of training faces, detected once and kept in `landmarks.npy`.

    Args:
        faces: Training faces, uint8 [N, H, W, 3].
        offsets: Where each is cut, plain and mirrored, int [N, 2, 2].
        work: Folder of the file; a row of it is NaN where no face is found.
    """

    def __init__(self, faces: np.ndarray, offsets: np.ndarray, work: Path) -> None:
        self._offsets = offsets
        self._detector = CenterFace.load()
        file = work / _FILE
        if not file.exists():
            self._known = np.full((len(faces), 5, 2), np.nan, np.float32)
            for row, pixels in enumerate(faces):
                found = self.in_picture(np.asarray(pixels))
                if found is not None:
                    self._known[row] = found
            partial = file.with_suffix(".partial.npy")
            np.save(partial, self._known)
            os.replace(partial, file)
        self._known = np.load(file)

    def cut(self, offsets: np.ndarray) -> Finder:
        """The same faces, cut elsewhere."""
        other = copy.copy(self)
        other._offsets = offsets
        return other

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
        eyes = self._known[:, 1] - self._known[:, 0]
        beside = self._known[:, 2] - self._known[:, :2].mean(1)
        turn = (beside * eyes).sum(1) / np.maximum((eyes * eyes).sum(1), 1e-6)
        return np.nan_to_num(np.abs(turn)) > least

    def in_picture(self, pixels: np.ndarray) -> np.ndarray | None:
        """[5, 2] in a picture, uint8 [H, W, 3], of the face nearest to its middle."""
        found = self._detector.detect(pixels)
        middle = np.array(pixels.shape[1::-1]) / 2
        return nearest_face(found, middle).landmarks if found else None


class Reader(nn.Module):
    """Sees where a crop has its landmarks, by a recognizer's features of it.

    Every landmark is the mean place under a map that adds up to one.

    Args:
        widths: Channels of the feature maps.
        frame: The part of a crop's side that the recognizer sees.
        width: Channels to which each map is reduced.
    """

    places: torch.Tensor

    def __init__(self, widths: Sequence[int], frame: slice, width: int = 32) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.mix = nn.Sequential(
            nn.Conv2d(width * len(widths), 64, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 5, 1),
        )
        side = (frame.stop - frame.start) / _HELD
        along = frame.start + side * (torch.arange(_HELD) + 0.5) - 0.5
        y, x = torch.meshgrid(along, along, indexing="ij")
        self.register_buffer("places", torch.stack([x, y], -1).reshape(-1, 2))

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Landmarks [B, 5, 2] (x, y), in pixels of the crop, of features [B, C, s, s]."""
        pairs = zip(self.reduce, features, strict=True)
        maps = [
            F.interpolate(F.silu(reduce(f)), (_HELD, _HELD), mode="bilinear", align_corners=False)
            for reduce, f in pairs
        ]
        seen = self.mix(torch.cat(maps, 1)).flatten(2).softmax(-1)
        landmarks: torch.Tensor = seen @ self.places
        return landmarks
