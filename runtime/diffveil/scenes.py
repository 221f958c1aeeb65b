"""One photo with the faces cut out of it, on the way into the operations and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeGuard, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffveil.align import crop_face, in_crop, similarity
from diffveil.errors import NoFaceError, OptionError, PhotoError
from diffveil.faces import Face
from diffveil.photos import Photo, PhotoSource, load_photo, photo_digest

__all__ = [
    "OnMissing",
    "Scene",
    "aligned_scene",
    "is_one_photo",
    "read_scenes",
    "several_photos",
    "to_images",
    "to_pixels",
]

OnMissing: TypeAlias = Literal["error", "keep"]
"""What happens when a photo has no face: an error, or it is kept as it is."""

_Pixels = NDArray[np.uint8]
_Matrix = NDArray[np.float64]

_ONE_PHOTO = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, Photo)


@dataclass(frozen=True, eq=False)
class Scene:
    """One photo and its faces.

    Attributes:
        photo: The photo, unchanged.
        faces: Faces found or given, F of them.
        matrices: For each face float64 [2, 3], photo to crop.
        crops: Aligned faces, uint8 [F, S, S, 3], RGB.
    """

    photo: Photo
    faces: tuple[Face, ...]
    matrices: tuple[_Matrix, ...]
    crops: _Pixels

    @classmethod
    def cut(cls, photo: Photo, faces: Iterable[Face], template: _Matrix, size: int) -> Scene:
        """Align faces and cut them out.

        Args:
            photo: The photo.
            faces: Its faces.
            template: Where the five landmarks lie in a crop, float64 [5, 2].
            size: Side S of a crop in pixels.

        Raises:
            OptionError: Something given as a face is none, or a face cannot be aligned or belongs
                to another photo.
        """
        faces = tuple(faces)
        for face in faces:
            if not isinstance(face, Face):
                raise OptionError(f"faces: received {type(face).__name__}, expected diffveil.Face")
        matrices = tuple(similarity(face.landmarks, template) for face in faces)
        crops = [crop_face(photo.pixels, matrix, size) for matrix in matrices]
        stacked = np.stack(crops) if crops else np.empty((0, size, size, 3), dtype=np.uint8)
        return cls(photo, faces, matrices, stacked)

    @property
    def landmarks(self) -> _Matrix:
        """Where the faces' landmarks lie in their crops, float64 [F, 5, 2]."""
        pairs = zip(self.faces, self.matrices, strict=True)
        own = [in_crop(face.landmarks, matrix) for face, matrix in pairs]
        return np.stack(own) if own else np.empty((0, 5, 2))

    @property
    def digest(self) -> int:
        """The photo's digest as a number."""
        return int.from_bytes(photo_digest(self.photo), "big")


def aligned_scene(photo: Photo, template: _Matrix, size: int) -> Scene:
    """The scene of a photo that is itself an aligned face, of any resolution.

    Args:
        photo: A square photo whose landmarks lie where the template has them.
        template: Where the five landmarks lie in a crop, float64 [5, 2].
        size: Side S of a crop in pixels.

    Raises:
        PhotoError: The photo is not square.
    """
    if photo.width != photo.height:
        raise PhotoError(
            f"{photo.name or 'photo'}: {photo.width}x{photo.height} pixels, "
            "expected a square for an aligned face"
        )
    # Pixel centres are whole numbers, so scaling about the corner shifts them by half a pixel.
    scale = size / photo.width
    shift = 0.5 * scale - 0.5
    matrix = np.array([[scale, 0.0, shift], [0.0, scale, shift]])
    side = float(photo.width)
    face = Face((0.0, 0.0, side, side), (template - shift) / scale, 1.0)
    crop = crop_face(photo.pixels, matrix, size)
    return Scene(photo, (face,), (matrix,), crop[None])


def read_scenes(
    sources: Iterable[PhotoSource],
    faces: Sequence[Iterable[Face] | None] | None,
    *,
    detect: Callable[[_Pixels], Iterable[Face]],
    aligned: bool,
    on_missing: OnMissing,
    template: _Matrix,
    size: int,
) -> list[Scene]:
    """Read photos and cut out their faces.

    Args:
        sources: The photos.
        faces: For each photo its faces, or None where they shall be detected; None for all photos.
        detect: Finds the faces in pixels, uint8 [H, W, 3] RGB.
        aligned: Each photo is itself one aligned face.
        on_missing: What happens when a photo has no face.
        template: Where the five landmarks lie in a crop, float64 [5, 2].
        size: Side S of a crop in pixels.

    Raises:
        PhotoError: A photo cannot be read.
        NoFaceError: Photos have no face and `on_missing` is "error"; the message names them all.
        OptionError: Arguments contradict each other or are out of range.
    """
    if on_missing not in get_args(OnMissing):
        raise OptionError(f"on_missing is {on_missing!r}, expected 'error' or 'keep'")
    if aligned and faces is not None:
        raise OptionError(
            "faces: an aligned photo is its own face; give faces or aligned, not both"
        )
    sources = several_photos(sources)
    given = [None] * len(sources) if faces is None else list(faces)
    if len(given) != len(sources):
        raise OptionError(
            f"faces: received {len(given)} lists for {len(sources)} photos, expected one each"
        )
    scenes = []
    for source, own in zip(sources, given, strict=True):
        photo = load_photo(source)
        if aligned:
            scenes.append(aligned_scene(photo, template, size))
        else:
            found = detect(photo.pixels) if own is None else own
            scenes.append(Scene.cut(photo, found, template, size))
    missing = [
        scene.photo.name or f"photo {number}"
        for number, scene in enumerate(scenes, start=1)
        if not scene.faces
    ]
    if missing and on_missing == "error":
        raise NoFaceError(
            f"no face found in {', '.join(missing)}: nothing was protected. Pass the faces "
            "yourself, or on_missing='keep' to let photos without faces through"
        )
    return scenes


def is_one_photo(source: object) -> TypeGuard[PhotoSource]:
    """Whether a source is one photo rather than a sequence of them."""
    return isinstance(source, _ONE_PHOTO)


def several_photos(sources: Iterable[PhotoSource]) -> list[PhotoSource]:
    """The photos of a sequence.

    Raises:
        PhotoError: It is no sequence.
    """
    try:
        return list(sources)
    except TypeError:
        raise PhotoError(
            "expected a path, bytes, a Pillow image, an array or a sequence of them, "
            f"received {type(sources).__name__}"
        ) from None


def to_images(crops: _Pixels) -> NDArray[np.float32]:
    """Crops uint8 [N, S, S, 3] as programs take them: float32 [N, 3, S, S] in [-1, 1]."""
    images = crops.transpose(0, 3, 1, 2).astype(np.float32)
    images /= 127.5
    images -= 1.0
    return np.ascontiguousarray(images)


def to_pixels(images: NDArray[np.float32]) -> _Pixels:
    """Images float32 […, 3, S, S] in [-1, 1] as crops: uint8 […, S, S, 3]."""
    levels = np.rint((images.astype(np.float64) + 1.0) * 127.5)
    return np.clip(np.moveaxis(levels, -3, -1), 0, 255).astype(np.uint8)
