"""Pseudonyms: a person becomes the same new face in every photo, another under another secret.

Two photos of a person are alike for a recognizer, but not equal, and no code computed from one
photo alone survives that (docs/pseudonyms.md has the figures). So an embedding is quantised to the
nearest of a list of *people*: those that the caller has enrolled, or those that the photos of a
call show. A person's code and the secret give a key, the key a noise map, and the noise map a
decoy: a face of nobody. All photos of the person are drawn from that noise and guided to that
decoy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import in_chunks
from diffveil.denoising import Denoiser
from diffveil.errors import OptionError
from diffveil.noise import NoiseKey
from diffveil.operations import FaceBatch, FaceOperations
from diffveil.plans import Guidance, Plan
from diffveil.samplers import dpm_solver
from diffveil.sampling import Progress, run

__all__ = ["PSEUDONYM", "Pseudonyms", "code_of", "nearest"]

_F32: TypeAlias = NDArray[np.float32]

_THRESHOLD = 0.4  # of a match, where a bundle states none
# Unconditional throughout, and all noise: a photo's own conditioning or latent would make the new
# face another one in each photo. So little guidance that the decoy stays a face.
PSEUDONYM = Plan(
    sampler="dpm++2m",
    steps=6,
    strength=1.0,
    conditional_above=1000,
    background_below=300,
    guidance=Guidance(
        weight=((-1, 0.06),),
        normalise="rms",
        scale_with_noise=True,
        margin=0.7,
        mode="attract",
    ),
)
"""How a face becomes its decoy."""


class Pseudonyms:
    """The new faces of one secret.

    Args:
        operations: The operations on crops.
        secret: Key used for nothing else.
    """

    def __init__(self, operations: FaceOperations, secret: NoiseKey) -> None:
        self._operations = operations
        self._secret = secret.derive("diffveil/v1/pseudonym")

    def codes(self, faces: FaceBatch, people: _F32 | None) -> list[int]:
        """The code of each face's person, by the bundle's recognizer at its FAR of 1 %.

        Args:
            faces: Aligned faces, N of them.
            people: Enrolled, float32 [P, E]; None for nobody.

        Raises:
            OptionError: The people are not such an array.
            EngineError: A program failed.
        """
        bundle = self._operations.bundle
        if people is None:
            people = np.empty((0, bundle.dimensions.embedding_width), dtype=np.float32)
        return nearest(faces.identities, people, bundle.thresholds.get("0.01", _THRESHOLD))

    def draw(
        self, faces: FaceBatch, codes: Sequence[int], *, progress: Progress | None = None
    ) -> _F32:
        """Faces as their pseudonyms.

        Args:
            faces: Aligned faces, N of them.
            codes: The code of each one's person; see `code_of`.
            progress: Called after each step.

        Returns:
            Float32 [N, 3, S, S] in [-1, 1].

        Raises:
            EngineError: A program failed.
        """
        people = sorted(set(codes))
        decoys = dict(zip(people, self.decoys(people), strict=True))
        return self._operations.disguise(
            faces,
            PSEUDONYM,
            anchors=np.stack([decoys[code] for code in codes]),
            keys=[self._key(code) for code in codes],
            progress=progress,
        )

    def decoys(self, codes: Sequence[int]) -> _F32:
        """Identities of the faces that the codes' noise becomes, float32 [P, E], unit length."""
        operations, programs = self._operations, self._operations.programs
        # Trailing steps of the plan, without guidance and without a photo.
        table = dpm_solver(operations.schedule, PSEUDONYM.steps, spacing=PSEUDONYM.spacing)
        noise = operations.start_noise([self._key(code) for code in codes])[:, 0]
        size, d = operations.max_batch, operations.bundle.dimensions
        tokens = np.zeros((len(codes), d.stages, d.token_width), dtype=np.float32)
        denoise = Denoiser(
            programs, tokens, table.timesteps, conditional_above=1000, max_batch=size
        )
        latents, _ = run(table, noise, denoise)
        images = np.clip(in_chunks(programs.decode, size, latent=latents), -1.0, 1.0)
        return in_chunks(programs.recognize, size, image=images)

    def _key(self, code: int) -> NoiseKey:
        return self._secret.derive("person", code)


def code_of(person: _F32) -> int:
    """The identity code of one of a list of people, an embedding float32 [E]: 256 bits."""
    digest = hashlib.sha256(np.ascontiguousarray(person, dtype="<f4").tobytes()).digest()
    return int.from_bytes(digest, "big")


def nearest(embeddings: _F32, people: _F32, threshold: float) -> list[int]:
    """The code of each face's person.

    A face that matches none of the people becomes one more of them, so that later faces of the
    same call can match it.

    Args:
        embeddings: Faces, float32 [N, E], unit length.
        people: Enrolled, float32 [P, E], unit length; P may be 0.
        threshold: Least cosine of a match.

    Returns:
        A code a face.

    Raises:
        OptionError: The people are not such an array.
    """
    width = embeddings.shape[-1]
    people = np.asarray(people)
    if people.ndim != 2 or people.shape[1] != width or not np.isfinite(people).all():
        raise OptionError(
            f"people: received {list(people.shape)}, expected finite embeddings [P, {width}] as "
            "Protector.embed gives them"
        )
    known = [person.astype(np.float32) for person in people]
    codes = []
    for face in embeddings:
        cosines = np.array([face @ person for person in known])
        best = int(cosines.argmax()) if known else -1
        if best < 0 or cosines[best] < threshold:
            best = len(known)
            known.append(face)
        codes.append(code_of(known[best]))
    return codes
