"""What an operation on a photo returns."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffveil.errors import OptionError
from diffveil.faces import Face
from diffveil.keys import MAX_PICTURES, RecoveryKey
from diffveil.photos import Photo, encode_photo, load_photo, shows_same_pixels, write_photo
from diffveil.pictures import picture_of

__all__ = ["FaceEmbeddings", "Result"]


@dataclass(frozen=True, eq=False)
class Result:
    """A protected or recovered photo.

    Attributes:
        photos: The photo in each variant, at least one, with its colour profile and, for saving
            with `keep_metadata`, its cleaned EXIF.
        faces: The faces that were processed. What is not listed here was not protected. Empty when
            none was found and the photo kept.
        key: What brings the faces back, the same for all variants; None when it was not asked for,
            when no face was found, and after recovery. It belongs to the variants, pixel by pixel,
            and to what `save` and `encode` have made of them: so save a JPEG first, then seal.
        backend: Name of the backend that ran; the last one, if one failed on the way.
        seconds: Wall-clock time of the call, divided evenly among its photos.
        preset: Name of the preset; None after recovery, which follows the key.
        backend_reason: Why it was that backend, in words.
        expected_loss: After recovery on another backend than the key's: how much worse than there
            the face may be, at most, in dB of PSNR; None otherwise.
    """

    photos: tuple[Photo, ...]
    faces: tuple[Face, ...]
    key: RecoveryKey | None = field(repr=False)
    backend: str
    seconds: float
    preset: str | None = None
    backend_reason: str = ""
    expected_loss: float | None = None

    @cached_property
    def images(self) -> tuple[Image.Image, ...]:
        """The photo in each variant, as Pillow images, RGB or RGBA."""
        return tuple(photo.to_image() for photo in self.photos)

    @property
    def image(self) -> Image.Image:
        """The photo, in its first variant, as a Pillow image, RGB or RGBA."""
        return self.images[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The first variant for NumPy: uint8 [H, W, 3] RGB, without opacity."""
        return np.array(self.photos[0].pixels, dtype=dtype, copy=True if copy is None else copy)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        variant: int = 0,
        quality: int = 95,
        keep_metadata: bool = False,
    ) -> Path:
        """Write one variant of the photo; see `diffveil.save_photo`.

        Args:
            path: File to write; its suffix names the format.
            variant: Which variant, from 0.
            quality: Of JPEG and WebP, 1 (small) … 100 (faithful).
            keep_metadata: Write EXIF (date, camera, place) as well; it identifies people too.

        Returns:
            The path written.

        Raises:
            OptionError: No such variant, an unknown suffix, or quality out of range.
            PhotoError: The file cannot be written.
        """
        encoded = self.encode(path, variant=variant, quality=quality, keep_metadata=keep_metadata)
        return write_photo(encoded, path)

    def encode(
        self,
        path: str | os.PathLike[str],
        *,
        variant: int = 0,
        quality: int = 95,
        keep_metadata: bool = False,
    ) -> bytes:
        """The file that `save` would write, in memory. Arguments and errors are its own.

        What the file shows becomes one of the pictures that `key` belongs to.
        """
        if not 0 <= variant < len(self.photos):
            raise OptionError(f"variant is {variant}, expected 0 to {len(self.photos) - 1}")
        photo = self.photos[variant]
        encoded = encode_photo(photo, path, quality=quality, keep_metadata=keep_metadata)
        if self.key is not None and not shows_same_pixels(photo, path):
            seen = load_photo(encoded, max_pixels=photo.width * photo.height)
            fitting = (*self.key.pictures, picture_of(seen))[-MAX_PICTURES:]
            object.__setattr__(self, "key", replace(self.key, pictures=fitting))
        return encoded


@dataclass(frozen=True, eq=False)
class FaceEmbeddings:
    """What the bundle's recognizer sees in a photo.

    Embeddings identify people: keep them as carefully as faces.

    Attributes:
        faces: The faces, F of them.
        embeddings: float32 [F, E], unit length, in the order of the faces. The product of two is
            their cosine; `Bundle.thresholds` says from which value on two faces match.
    """

    faces: tuple[Face, ...]
    embeddings: NDArray[np.float32] = field(repr=False)
