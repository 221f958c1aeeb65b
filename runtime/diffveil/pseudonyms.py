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
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import in_chunks
from diffveil.bundle import Bundle
from diffveil.denoising import Denoiser
from diffveil.errors import OptionError
from diffveil.facebatch import FaceBatch
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.presets import PSEUDONYM
from diffveil.samplers import dpm_solver
from diffveil.sampling import Progress, run

__all__ = ["People", "Pseudonyms", "as_met", "code_of", "nearest"]

_F32: TypeAlias = NDArray[np.float32]
People: TypeAlias = Mapping[str, _F32]
"""Enrolled people by name: embeddings of unit length of each, float32 [E] or [K, E]."""

_THRESHOLD = 0.4  # of a match, where a bundle states none


class Pseudonyms:
    """The new faces of one secret.

    Args:
        operations: The operations on crops.
        secret: Key used for nothing else.
    """

    def __init__(self, operations: FaceOperations, secret: NoiseKey) -> None:
        self._operations = operations
        self._secret = secret.derive("diffveil/v1/pseudonym")

    def codes(self, faces: FaceBatch, people: People | None) -> list[int]:
        """The code of each face's person, by the bundle's recognizer at its FAR of 1 %.

        Args:
            faces: Aligned faces, N of them.
            people: The enrolled; None for nobody.

        Raises:
            OptionError: The people are not such an array.
            EngineError: A program failed.
        """
        return nearest(faces.identities, people or {}, _threshold(self._operations.bundle))

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


def as_met(embeddings: Sequence[_F32], bundle: Bundle) -> People:
    """The people whom faces show, [E] each, numbered in the order in which they are first met."""
    people: dict[str, _F32] = {}
    for face in embeddings:
        if not any(face @ person >= _threshold(bundle) for person in people.values()):
            people[f"person {len(people) + 1}"] = face
    return people


def code_of(person: str | _F32) -> int:
    """The identity code of a person, 256 bits: of the name, or of an embedding float32 [E]."""
    if isinstance(person, str):
        material = b"name" + person.encode("utf-8", "surrogatepass")
    else:
        material = b"face" + np.ascontiguousarray(person, dtype="<f4").tobytes()
    return int.from_bytes(hashlib.sha256(material).digest(), "big")


def nearest(embeddings: _F32, people: People, threshold: float) -> list[int]:
    """The code of each face's person.

    A face that matches none of the people is a new person, whom later faces can match too.

    Args:
        embeddings: Faces, float32 [N, E], unit length.
        people: The enrolled.
        threshold: Least cosine of a match.

    Returns:
        A code a face.

    Raises:
        OptionError: The people are not such arrays.
    """
    width = embeddings.shape[-1]
    known: list[_F32] = []
    codes_known: list[int] = []
    for name, own in people.items():
        rows = np.atleast_2d(np.asarray(own, dtype=np.float32))
        if rows.ndim != 2 or rows.shape[1] != width or not np.isfinite(rows).all():
            raise OptionError(
                f"people: received {list(rows.shape)}, expected finite embeddings [K, {width}] of "
                "each person, as Protector.embed gives them"
            )
        known.extend(rows)
        codes_known.extend([code_of(name)] * len(rows))
    codes = []
    for face in embeddings:
        cosines = np.array([face @ person for person in known])
        best = int(cosines.argmax()) if known else -1
        if best < 0 or cosines[best] < threshold:
            best = len(known)
            known.append(face)
            codes_known.append(code_of(face))
        codes.append(codes_known[best])
    return codes


def _threshold(bundle: Bundle) -> float:
    return bundle.thresholds.get("0.01", _THRESHOLD)
