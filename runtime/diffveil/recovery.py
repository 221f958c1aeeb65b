"""recover on whole photos: keys to faces in one batch, then pasted back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from diffveil.align import paste_faces
from diffveil.errors import KeyMismatchError, OptionError
from diffveil.faces import Face
from diffveil.keys import FaceKey, RecoveryKey
from diffveil.masks import recovery_mask
from diffveil.operations import FaceOperations
from diffveil.photos import Photo
from diffveil.pictures import is_one_of, looks_like_one_of
from diffveil.plans import Inversion
from diffveil.protection import part_of
from diffveil.result import Result
from diffveil.sampling import Progress
from diffveil.scenes import to_pixels

__all__ = ["CROSS_BACKEND_LOSS", "check_key", "expected_loss", "recover"]

CROSS_BACKEND_LOSS: Mapping[str, float] = MappingProxyType(
    {"float32": 0.1, "float16": 0.1, "bfloat16": 1.0}
)
"""What recovery on another backend than the key's may cost, in dB of PSNR against the photo.

By the precision that the bundle's denoiser computes in. `docs/engines.md` says what was measured.
"""


def recover(
    operations: FaceOperations,
    photos: Sequence[Photo],
    keys: Sequence[RecoveryKey],
    *,
    reencoded: bool = False,
    started: float | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Put the original faces back into protected photos: those that the keys hold, no others.

    The faces come from the keys alone; of a photo only what lies around them is used. They replace
    all that protection changed and a narrow rim, so nothing of the protected faces stays.

    Args:
        operations: The operations on crops.
        photos: Protected photos.
        keys: The recovery key of each.
        reencoded: Accept a photo that only looks like the key's, see `check_key`.
        started: `time.perf_counter` when work on these photos began; by default now.
        progress: Called as `progress(done, total)` after each step of the call.

    Returns:
        A result for each photo.

    Raises:
        KeyMismatchError: A key belongs to another bundle or photo.
        OptionError: A key was wiped.
        EngineError: A program failed.
    """
    started = time.perf_counter() if started is None else started
    # Faces whose keys were made alike, of tokens or of conditionings, run together.
    alike: dict[tuple[Inversion, int], list[tuple[int, FaceKey]]] = {}
    for index, (photo, key) in enumerate(zip(photos, keys, strict=True)):
        inversion = check_key(operations, photo, key, reencoded=reencoded)
        group = inversion, key.faces[0].tokens.ndim
        alike.setdefault(group, []).extend((index, face) for face in key.faces)
    steps = {group: len(group[0].recovery(operations.schedule).steps) for group in alike}
    done, total = 0, sum(steps.values())
    crops: list[list[np.ndarray]] = [[] for _ in photos]
    for group, members in alike.items():
        images = operations.recover(
            np.stack([face.tokens for _, face in members]).astype(np.float32),
            np.stack([face.latents for _, face in members]).astype(np.float32),
            group[0],
            progress=part_of(progress, done, total),
        )
        done += steps[group]
        for (index, _), crop in zip(members, to_pixels(images), strict=True):
            crops[index].append(crop)
    mask = recovery_mask(operations.bundle.image_size, operations.bundle.template)
    recovered = [
        photo.with_pixels(
            # The colours are the key's: matching them to the photo's would be a second guess.
            paste_faces(
                photo.pixels, own, [face.matrix for face in key.faces], mask, match_colour=False
            )
        )
        for photo, key, own in zip(photos, keys, crops, strict=True)
    ]
    seconds = (time.perf_counter() - started) / max(len(photos), 1)
    programs = operations.programs
    return [
        Result(
            (photo,),
            tuple(Face(f.box, f.landmarks) for f in key.faces),
            key=None,
            backend=programs.backend.name,
            seconds=seconds,
            backend_reason=programs.why,
            expected_loss=expected_loss(operations, key),
        )
        for photo, key in zip(recovered, keys, strict=True)
    ]


def expected_loss(operations: FaceOperations, key: RecoveryKey) -> float | None:
    """What recovery here may cost because another backend made the key.

    Args:
        operations: The operations, on the backend that recovers.
        key: The key.

    Returns:
        dB of PSNR against the photo, an upper bound; None where the key's own backend runs.
    """
    if key.backend == operations.programs.backend.name:
        return None
    return CROSS_BACKEND_LOSS[operations.bundle.program("denoise").precision]


def check_key(
    operations: FaceOperations, photo: Photo, key: RecoveryKey, *, reencoded: bool = False
) -> Inversion:
    """Hold a key against the bundle and a photo.

    Args:
        operations: The operations of the bundle.
        photo: The protected photo.
        key: Its key.
        reencoded: Accept other pixels, if size and coarse colours are those of the key's picture.

    Returns:
        The sampler and steps that the key was made with.

    Raises:
        KeyMismatchError: It belongs to another bundle or photo; the message says what differs.
        OptionError: It was wiped.
    """
    key.require_faces()
    bundle, d = operations.bundle, operations.bundle.dimensions
    if key.bundle != bundle.fingerprint:
        raise KeyMismatchError(
            f"the key was made with bundle {key.bundle[:16]}…, but bundle '{bundle.name}' is "
            f"{bundle.fingerprint[:16]}…; load the bundle that protected the photo"
        )
    if key.photo_size != (photo.height, photo.width):
        height, width = key.photo_size
        raise KeyMismatchError(
            f"the key belongs to a photo of {width}x{height} pixels, but "
            f"'{photo.name or 'photo'}' has {photo.width}x{photo.height}; "
            "give the protected photo as it was written, not scaled, cropped or rotated"
        )
    _check_picture(photo, key, reencoded)
    try:
        inversion = Inversion(key.sampler, key.steps)  # type: ignore[arg-type]  # checked there
        inversion.recovery(operations.schedule)
    except OptionError as error:
        raise KeyMismatchError(f"the key cannot be used with this bundle: {error}") from error
    face = key.faces[0]  # all of a key have the same shapes
    tokens = (d.stages, d.token_width), (d.stages, d.conditioning_length, d.conditioning_width)
    latents = d.latent_channels, d.latent_size, d.latent_size
    if face.tokens.shape not in tokens or face.latents.shape[1:] != latents:
        raise KeyMismatchError(
            f"the key's tensors do not have the shapes of bundle '{bundle.name}'"
        )
    return inversion


def _check_picture(photo: Photo, key: RecoveryKey, reencoded: bool) -> None:
    name = photo.name or "photo"
    if reencoded:
        if not looks_like_one_of(key.pictures, photo):
            raise KeyMismatchError(
                f"'{name}' does not even look like the picture that the key belongs to; "
                "give the protected photo, or a copy of it that was only encoded again"
            )
    elif not is_one_of(key.pictures, photo):
        raise KeyMismatchError(
            f"the key belongs to another picture than '{name}': not all pixels are the same; if "
            "this is the protected photo after another lossy encoding, or with other faces "
            "recovered, pass reencoded=True (--reencoded)"
        )
