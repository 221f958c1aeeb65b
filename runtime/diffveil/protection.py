"""anonymize and hide on whole photos: the faces of all scenes in one batch, then pasted back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.align import paste_faces
from diffveil.batching import MAX_BATCH
from diffveil.errors import OptionError
from diffveil.keychecks import compact, compact_noise
from diffveil.keys import FaceKey, RecoveryKey
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.photos import Photo
from diffveil.pictures import picture_of
from diffveil.plans import Plan, Preset
from diffveil.presets import DEFAULT_PRESET, PSEUDONYM
from diffveil.presets import preset as preset_named
from diffveil.pseudonyms import People, Pseudonyms
from diffveil.result import Result
from diffveil.sampling import Latent, Progress
from diffveil.scenes import Scene, to_images, to_pixels

__all__ = ["Operation", "Protection", "part_of", "protect"]

Operation: TypeAlias = Literal["anonymize", "hide"]

_F32: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Protection:
    """What to do to photos, every choice made and checked.

    Attributes:
        operation: Which operation.
        preset: The numbers.
        variants: Results for each photo.
        noise: Key that the noise of every face is derived from.
        make_key: Whether to make recovery keys.
        pseudonym: Key that new faces are derived from, for pseudonyms; None for strangers.
        people: Whom pseudonyms are told apart by; None for nobody.
    """

    operation: Operation
    preset: Preset
    variants: int
    noise: NoiseKey
    make_key: bool
    pseudonym: NoiseKey | None = None
    people: People | None = None

    @classmethod
    def choose(
        cls,
        operation: Operation,
        *,
        preset: str | Preset | None,
        steps: int | None,
        strength: float | None,
        variants: int,
        seed: int | NoiseKey | None,
        make_key: bool,
    ) -> Protection:
        """Settle the arguments of `Protector.anonymize` and `.hide`; None takes the default.

        Raises:
            OptionError: An argument is out of range.
        """
        if not 1 <= variants <= MAX_BATCH:
            raise OptionError(f"variants is {variants}, expected 1 to {MAX_BATCH}")
        if not isinstance(preset, Preset):
            preset = preset_named(DEFAULT_PRESET if preset is None else preset)
        if seed is None:
            seed = NoiseKey.random()
        elif not isinstance(seed, NoiseKey):
            seed = NoiseKey.from_seed(seed)
        return cls(
            operation, preset.with_(steps=steps, strength=strength), variants, seed, make_key
        )

    @property
    def plan(self) -> Plan:
        """The preset's numbers for the operation."""
        if self.pseudonym is not None:
            return PSEUDONYM
        return self.preset.anonymize if self.operation == "anonymize" else self.preset.hide

    def noise_keys(self, scene: Scene) -> Iterator[NoiseKey]:
        """A key for each face. It depends on the photo's pixels, not on its name or company."""
        digest = scene.digest
        for index in range(len(scene.faces)):
            yield self.noise.derive(f"diffveil/v1/{self.operation}", digest, index)


def protect(
    operations: FaceOperations,
    scenes: Sequence[Scene],
    protection: Protection,
    *,
    started: float | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Protect the faces of photos and make their recovery keys.

    Args:
        operations: The operations on crops.
        scenes: The photos with their faces; those without faces come back unchanged.
        protection: What to do.
        started: `time.perf_counter` when work on these photos began; by default now.
        progress: Called as `progress(done, total)` after each step of the call.

    Returns:
        A result for each scene.

    Raises:
        OptionError: An option does not fit the bundle's schedule.
        EngineError: A program failed.
    """
    started = time.perf_counter() if started is None else started
    faces = _run(operations, scenes, protection, progress)
    done: list[tuple[tuple[Photo, ...], RecoveryKey | None]] = []
    first = 0
    for scene in scenes:
        rows = slice(first, first + len(scene.faces))
        first = rows.stop
        if faces is None or not scene.faces:
            done.append(((scene.photo,) * protection.variants, None))
            continue
        crops = to_pixels(faces.images[rows])
        masks = faces.masks[rows, 0]
        photos = tuple(_pasted(scene, crops[:, v], masks) for v in range(protection.variants))
        done.append((photos, _key(operations, scene, photos, protection, faces, rows)))
    seconds = (time.perf_counter() - started) / max(len(scenes), 1)
    programs, preset = operations.programs, protection.preset.name
    backend, why = programs.backend.name, programs.why
    return [
        Result(photos, scene.faces, key, backend, seconds, preset, why)
        for scene, (photos, key) in zip(scenes, done, strict=True)
    ]


def part_of(progress: Progress | None, first: int, total: int) -> Progress | None:
    """A callback for one run of a call that makes several: its steps follow `first` others."""
    if progress is None:
        return None
    return lambda done, _: progress(first + done, total)


@dataclass(frozen=True, eq=False)
class _Faces:
    """What became of all faces: images [N, V, 3, S, S], and where they replace the photos', masks
    [N, 1, S, S]; key-E and key-I if a key is made."""

    images: _F32
    masks: _F32
    tokens: _F32 | None
    latents: Latent | None


def _run(
    operations: FaceOperations,
    scenes: Sequence[Scene],
    protection: Protection,
    progress: Progress | None,
) -> _Faces | None:
    """Process all faces of all scenes in one batch; None if there is no face."""
    plan, recovery = protection.plan, protection.preset.recovery
    steps = len(plan.table(operations.schedule).steps)
    total = steps
    if protection.make_key:
        total += len(recovery.forward(operations.schedule).steps)
    crops = [scene.crops for scene in scenes if scene.faces]
    if not crops:
        return None
    landmarks = np.concatenate([scene.landmarks for scene in scenes])
    faces = operations.prepare(to_images(np.concatenate(crops)), landmarks)
    told = part_of(progress, 0, total)
    if protection.pseudonym is not None:
        pseudonyms = Pseudonyms(operations, protection.pseudonym)
        codes = pseudonyms.codes(faces, protection.people)
        images = pseudonyms.draw(faces, codes, progress=told)[:, None]
    else:
        act = operations.anonymize if protection.operation == "anonymize" else operations.hide
        images = act(
            faces,
            plan,
            keys=[key for scene in scenes for key in protection.noise_keys(scene)],
            variants=protection.variants,
            progress=told,
        )
    if not protection.make_key:
        return _Faces(images, faces.pixel_masks, None, None)
    tokens, latents = operations.invert(
        faces,
        recovery,
        # Rounded before they are used, so that keeping them in float16 costs recovery nothing.
        tokens=compact(faces.tokens).astype(np.float32),
        progress=part_of(progress, steps, total),
    )
    return _Faces(images, faces.pixel_masks, tokens, latents)


def _pasted(scene: Scene, crops: NDArray[np.uint8], masks: _F32) -> Photo:
    """The scene's photo with other faces, uint8 [F, S, S, 3], where their masks [F, S, S] are."""
    pixels = paste_faces(scene.photo.pixels, list(crops), scene.matrices, masks)
    return scene.photo.with_pixels(pixels)


def _key(
    operations: FaceOperations,
    scene: Scene,
    photos: Sequence[Photo],
    protection: Protection,
    faces: _Faces,
    rows: slice,
) -> RecoveryKey | None:
    """The recovery key of one scene, whose faces are these rows and became these photos."""
    if faces.tokens is None or faces.latents is None:
        return None
    # Half the size, for less than what storing a picture in eight bits loses (ADR 17).
    codes = compact(faces.tokens[rows]), compact_noise(faces.latents[rows])
    parts = zip(scene.faces, scene.matrices, *codes, strict=True)
    bundle = operations.bundle
    return RecoveryKey(
        faces=tuple(
            FaceKey(tokens, latents, matrix, face.box, face.landmarks, number)
            for number, (face, matrix, tokens, latents) in enumerate(parts)
        ),
        bundle=bundle.fingerprint,
        sampler=protection.preset.recovery.sampler,
        steps=protection.preset.recovery.steps,
        photo_size=(scene.photo.height, scene.photo.width),
        pictures=tuple(picture_of(photo) for photo in photos),
        backend=operations.programs.backend.name,
        precision=bundle.program("denoise").precision,
    )
