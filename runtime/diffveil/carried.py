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


@dataclass
class _Try:
    """One face on its way: the scene it is in, the frames to try, the crop drawn last."""

    scene: int
    frames: Iterator[Frame]
    frame: Frame
    crop: _Pixels
    settled: bool = False


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
    carrier, size = CarriedFaces(operations), operations.bundle.image_size
    tries = []
    for index, scene in enumerate(scenes):
        for matrix in scene.matrices:
            frames = Frame.near(matrix, _size(scene.photo), size)
            tries.append(_Try(index, frames, next(frames), np.empty(0, np.uint8)))
    pixels = [scene.photo.pixels for scene in scenes]
    for round_ in range(_TRIES):
        pending = [one for one in tries if not one.settled]
        if not pending:
            break
        if round_:
            for one in pending:
                one.frame = next(one.frames)
        matrices = [_matrix(one, scenes, size) for one in pending]
        crops = [
            crop_face(scenes[one.scene].photo.pixels, matrix, size)
            for one, matrix in zip(pending, matrices, strict=True)
        ]
        keys = [face_key(secret, one.frame) for one in pending]
        drawn = carrier.conceal(
            to_images(np.stack(crops)), keys, progress=None if round_ else progress
        )
        for one, crop in zip(pending, to_pixels(drawn), strict=True):
            one.crop = crop
        for index in {one.scene for one in pending}:
            own = [one for one in tries if one.scene == index]
            scene = scenes[index]
            pixels[index] = paste_faces(
                scene.photo.pixels,
                [one.crop for one in own],
                [_matrix(one, scenes, size) for one in own],
                carrier.mask,
                match_colour=False,  # a shift of colour would be a message of its own
            )
            found = (
                None
                if find is None
                else {
                    Frame.nearest(matrix, _size(scene.photo), size)
                    for matrix in find(pixels[index])
                }
            )
            for one in own:
                one.settled = found is None or one.frame in found
    if not all(one.settled for one in tries):
        raise NoFaceError(
            "carry: the detector does not find a new face again where it was drawn, so that it "
            "could not be recovered: nothing was protected. Keep a recovery key instead, or pass "
            "the faces yourself, here and to recover_carried"
        )
    seconds = (time.perf_counter() - started) / max(len(scenes), 1)
    backend = operations.programs.backend.name
    return [
        Result((scene.photo.with_pixels(new),), scene.faces, None, backend, seconds)
        for scene, new in zip(scenes, pixels, strict=True)
    ]


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
    photos: list[Photo] = []
    for scene, own in zip(scenes, frames, strict=True):
        matrices = [frame.matrix(_size(scene.photo), size) for frame in own]
        photos.append(
            scene.photo.with_pixels(
                paste_faces(
                    scene.photo.pixels,
                    [next(faces) for _ in own],
                    matrices,
                    carrier.mask,
                    match_colour=False,
                )
            )
        )
    seconds = (time.perf_counter() - started) / max(len(scenes), 1)
    backend = operations.programs.backend.name
    return [
        Result((photo,), scene.faces, None, backend, seconds)
        for photo, scene in zip(photos, scenes, strict=True)
    ]


def face_key(secret: NoiseKey, frame: Frame) -> NoiseKey:
    """The key of one face's map: of the secret and of where the face lies in the photo."""
    return secret.derive("diffveil/v1/carry", *frame.indices)


def _size(photo: Photo) -> tuple[int, int]:
    return photo.height, photo.width


def _matrix(one: _Try, scenes: Sequence[Scene], size: int) -> NDArray[np.float64]:
    return one.frame.matrix(_size(scenes[one.scene].photo), size)
