"""Whole photos whose faces carry their own way back: nothing is stored beside the photo."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.align import crop_face, paste_faces
from diffveil.carrying import CarriedFaces
from diffveil.errors import NoFaceError
from diffveil.frames import Frame
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.photos import Photo
from diffveil.result import Result
from diffveil.sampling import Progress
from diffveil.scenes import Scene, to_images, to_pixels

__all__ = ["Frames", "anonymize_carried", "face_key", "recover_carried"]

_Pixels: TypeAlias = NDArray[np.uint8]
Frames = Callable[[_Pixels], Sequence[NDArray[np.float64]]]
"""Where a detector would crop the faces of a photo, uint8 [H, W, 3]: matrices photo to crop."""

_TRIES = 8  # frames that a face is drawn in until the detector finds that very frame again
_SURE = 5  # tries in which it shall be found so clearly that compression does not change that
_SURE_WITHIN = 0.4  # of a step of the grid; ½ is where the next frame begins


def anonymize_carried(
    operations: FaceOperations,
    scenes: Sequence[Scene],
    secret: NoiseKey,
    *,
    find: Frames | None,
    started: float | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Replace faces by others that carry them.

    Each face is drawn in a frame of a coarse grid, near its own. The new face is then looked for in
    the finished photo; where it would be cropped in another frame of the grid, it is drawn again in
    the next nearest.

    Args:
        operations: The operations on crops.
        scenes: The photos with their faces; those without faces come back unchanged.
        secret: What recovers them.
        find: Where whoever recovers would crop; None where the frames will be known then, and need
            not be found.
        started: `time.perf_counter` when work on these photos began; by default now.
        progress: Called after each step of the first round.

    Returns:
        A result for each scene, without a key.

    Raises:
        NoFaceError: A new face is not found where it was drawn. No photo is changed.
        EngineError: A program failed.
    """
    started = time.perf_counter() if started is None else started
    album = _Album(operations, scenes, secret)
    for round_ in range(_TRIES):
        pending = [one for one in album.faces if not one.settled]
        if not pending:
            break
        album.draw(pending, None if round_ else progress)
        for index in {one.scene for one in pending}:
            album.paste(index)
            album.settle(index, find, _SURE_WITHIN if round_ < _SURE else 0.5)
    if not all(one.settled for one in album.faces):
        raise NoFaceError(
            "carry: the detector does not find a new face again where it was drawn, so that it "
            "could not be recovered: nothing was protected. Keep a recovery key instead, or pass "
            "the faces yourself, here and to recover_carried"
        )
    return _results(operations, scenes, album.pixels, started)


def recover_carried(
    operations: FaceOperations,
    scenes: Sequence[Scene],
    secret: NoiseKey,
    *,
    started: float | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Put back the faces that faces carry. Another secret gives faces of nobody, and no error.

    Args:
        operations: The operations on crops.
        scenes: The protected photos with the faces in them.
        secret: What they were protected with.
        started: `time.perf_counter` when work on these photos began; by default now.
        progress: Called after each step.

    Returns:
        A result for each scene.

    Raises:
        EngineError: A program failed.
    """
    started = time.perf_counter() if started is None else started
    carrier, size = CarriedFaces(operations), operations.bundle.image_size
    frames = [
        [Frame.nearest(matrix, _size(scene.photo), size) for matrix in scene.matrices]
        for scene in scenes
    ]
    crops = [
        crop_face(scene.photo.pixels, frame.matrix(_size(scene.photo), size), size)
        for scene, own in zip(scenes, frames, strict=True)
        for frame in own
    ]
    keys = [face_key(secret, frame) for own in frames for frame in own]
    faces: Iterator[_Pixels] = iter(())
    if crops:
        images = carrier.reveal(to_images(np.stack(crops)), keys, progress=progress)
        faces = iter(to_pixels(images))
    pixels = [
        paste_faces(
            scene.photo.pixels,
            [next(faces) for _ in own],
            [frame.matrix(_size(scene.photo), size) for frame in own],
            carrier.mask,
            match_colour=False,
        )
        for scene, own in zip(scenes, frames, strict=True)
    ]
    return _results(operations, scenes, pixels, started)


def face_key(secret: NoiseKey, frame: Frame) -> NoiseKey:
    """The key of one face's map: of the secret and of where the face lies in the photo."""
    return secret.derive("diffveil/v1/carry", *frame.indices)


@dataclass
class _Drawn:
    """One face on its way: its scene, the frames to try, the one tried last and what it gave."""

    scene: int
    frames: Iterator[Frame]
    frame: Frame | None = None
    matrix: NDArray[np.float64] | None = None
    crop: _Pixels | None = None
    settled: bool = False


class _Album:
    """The photos of a call while their faces are drawn."""

    def __init__(
        self, operations: FaceOperations, scenes: Sequence[Scene], secret: NoiseKey
    ) -> None:
        self._carrier = CarriedFaces(operations)
        self._side = operations.bundle.image_size
        self._scenes = scenes
        self._secret = secret
        self.pixels = [scene.photo.pixels for scene in scenes]
        self.faces = [
            _Drawn(index, _frames(matrix, scene.photo, self._side))
            for index, scene in enumerate(scenes)
            for matrix in scene.matrices
        ]

    def draw(self, faces: Sequence[_Drawn], progress: Progress | None) -> None:
        """Draw faces, each in its next frame."""
        crops, keys = [], []
        for one in faces:
            photo = self._scenes[one.scene].photo
            one.frame = next(one.frames)
            one.matrix = one.frame.matrix(_size(photo), self._side)
            crops.append(crop_face(photo.pixels, one.matrix, self._side))
            keys.append(face_key(self._secret, one.frame))
        images = self._carrier.conceal(to_images(np.stack(crops)), keys, progress=progress)
        for one, crop in zip(faces, to_pixels(images), strict=True):
            one.crop = crop

    def paste(self, index: int) -> None:
        """Put all faces of one scene into its photo."""
        own = [one for one in self.faces if one.scene == index]
        self.pixels[index] = paste_faces(
            self._scenes[index].photo.pixels,
            [one.crop for one in own if one.crop is not None],
            [one.matrix for one in own if one.matrix is not None],
            self._carrier.mask,
            match_colour=False,  # shifted colours would be another face's
        )

    def settle(self, index: int, find: Frames | None, within: float) -> None:
        """Note which faces of one scene are found again in, or close to, their own frames."""
        size = _size(self._scenes[index].photo)
        found = None
        if find is not None:
            found = {Frame.within(m, size, self._side, within) for m in find(self.pixels[index])}
        for one in self.faces:
            if one.scene == index:
                one.settled = found is None or one.frame in found


def _results(
    operations: FaceOperations, scenes: Sequence[Scene], pixels: Sequence[_Pixels], started: float
) -> list[Result]:
    seconds = (time.perf_counter() - started) / max(len(scenes), 1)
    backend = operations.programs.backend.name
    return [
        Result((scene.photo.with_pixels(new),), scene.faces, None, backend, seconds)
        for scene, new in zip(scenes, pixels, strict=True)
    ]


def _frames(matrix: NDArray[np.float64], photo: Photo, side: int) -> Iterator[Frame]:
    """Frames to try: the nearest, and when none of them was sure enough, these again."""
    near = list(Frame.near(matrix, _size(photo), side))
    return iter([*near[:_SURE], *near])


def _size(photo: Photo) -> tuple[int, int]:
    return photo.height, photo.width
