"""Aligned faces, and what the programs say about them."""

from __future__ import annotations

from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import MAX_BATCH, in_chunks
from diffveil.engines import Programs
from diffveil.errors import OptionError
from diffveil.masks import fitted_mask, latent_mask
from diffveil.sampling import Latent

__all__ = ["Crops", "FaceBatch"]

_F32: TypeAlias = NDArray[np.float32]


class FaceBatch:
    """Aligned crops and what the programs say about them, each asked at most once.

    Not shared between threads: two would ask twice.

    Args:
        programs: Programs of the bundle.
        crops: Float32 [N, 3, S, S], RGB in [-1, 1], N at least 1.
        max_batch: Most rows of one program call.
        landmarks: Where each face's landmarks lie in its crop, float64 [N, 5, 2]; by default
            where the template has them.

    Raises:
        OptionError: The crops or landmarks are not such arrays.
    """

    def __init__(
        self,
        programs: Programs,
        crops: _F32,
        max_batch: int = MAX_BATCH,
        landmarks: NDArray[np.float64] | None = None,
    ) -> None:
        size = programs.bundle.image_size
        shape, dtype = list(np.shape(crops)), getattr(crops, "dtype", None)
        if dtype != np.float32 or len(shape) != 4 or shape[1:] != [3, size, size] or not shape[0]:
            raise OptionError(
                f"crops: received {dtype} {shape}, expected float32 [N, 3, {size}, {size}], N ≥ 1"
            )
        if landmarks is None:
            landmarks = np.broadcast_to(np.asarray(programs.bundle.template), (len(crops), 5, 2))
        elif landmarks.shape != (len(crops), 5, 2) or not np.isfinite(landmarks).all():
            raise OptionError(
                f"landmarks: received {list(landmarks.shape)}, "
                f"expected finite {[len(crops), 5, 2]}, five for each crop"
            )
        self._programs = programs
        self._max_batch = max_batch
        self.crops = crops
        self.landmarks = landmarks

    def __len__(self) -> int:
        return len(self.crops)

    def take(self, rows: NDArray[np.intp]) -> FaceBatch:
        """Some of the faces, by their numbers [R]; what is known of them is not asked again."""
        part = FaceBatch(self._programs, self.crops[rows], self._max_batch, self.landmarks[rows])
        for name in ("pixel_masks", "masks", "latents", "tokens", "identities"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][rows]
        return part

    @cached_property
    def pixel_masks(self) -> _F32:
        """Where a drawn face replaces the photo: float32 [N, 1, S, S], 0 … 1; `fitted_mask`."""
        bundle = self._programs.bundle
        masks = [fitted_mask(bundle.image_size, bundle.template, own) for own in self.landmarks]
        return np.stack(masks)[:, None]

    @cached_property
    def masks(self) -> _F32:
        """Where the face is in the latent: float32 [N, 1, s, s], 0 … 1.

        That of the pixels, and within it what `parse` takes for the face, where the bundle has that
        program: hair across the forehead and a hand at the chin stay the photo's.
        """
        size, masks = self._programs.bundle.dimensions.latent_size, self.pixel_masks
        if self._programs.can("parse"):
            faces = in_chunks(self._programs.parse, self._max_batch, image=self.crops)
            masks = masks * faces.clip(0, 1)
        return np.stack([latent_mask(mask, size) for mask in masks[:, 0]])[:, None]

    @cached_property
    def latents(self) -> Latent:
        """Encoded crops, float32 [N, C, s, s]."""
        return in_chunks(self._programs.encode, self._max_batch, image=self.crops)

    @cached_property
    def tokens(self) -> _F32:
        """Stage tokens (key-E), float32 [N, 10, D]."""
        return in_chunks(self._programs.embed, self._max_batch, image=self.crops)

    @cached_property
    def identities(self) -> _F32:
        """Identity embeddings, float32 [N, E], unit length."""
        return in_chunks(self._programs.recognize, self._max_batch, image=self.crops)


Crops: TypeAlias = "FaceBatch | NDArray[np.float32]"
"""Crops [N, 3, S, S], or the `FaceBatch` of them when several operations share it."""
