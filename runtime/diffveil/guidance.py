"""Identity guidance of one run: what `guide` is asked, and what is done with its answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import MAX_BATCH, chunks
from diffveil.engines import Programs
from diffveil.presets import Guidance
from diffveil.samplers import Step
from diffveil.sampling import Latent

__all__ = ["IdentityGuidance"]

# Below this a gradient is rounding noise (the energy's clamp makes it exactly zero): scaling that
# to unit size would push the face somewhere at random.
_VANISHING_RMS = 1e-12


class IdentityGuidance:
    """Gradient of the identity energy for a batch of faces, a `diffveil.sampling.Gradient`.

    How the guidance is put to the program (s is the similarity of face and photo, a cosine):

    * repel, no margin or one of at least zero: energy max(s, 0), the published method's;
    * repel, margin below zero: energy 1 + s, by attraction to the opposite embedding, because the
      published energy has no slope where s is already below zero;
    * attract: energy 1 - s.

    To repel, variants of one face also repel each other: energy max(cosine, 0) of every pair. To
    attract, they may not: all of them shall be recognised.

    With a margin, a face whose similarity is already beyond it is not pushed in that step, unless
    it still resembles another variant of itself.

    Args:
        programs: Programs of the bundle.
        guidance: The preset's numbers.
        identities: The photos' embeddings, float32 [N, E], unit length.
        variants: Rows V of a face; latents come face by face, its variants together.
        max_batch: Most rows of one program call.
    """

    def __init__(
        self,
        programs: Programs,
        guidance: Guidance,
        identities: NDArray[np.float32],
        *,
        variants: int = 1,
        max_batch: int = MAX_BATCH,
    ) -> None:
        self._programs = programs
        self._guidance = guidance
        self._variants = variants
        self._identities = np.repeat(identities, variants, axis=0)
        rows = len(self._identities)
        self._chunks = chunks(rows, max_batch, variants)
        repel = guidance.mode == "repel"
        opposite = repel and guidance.margin is not None and guidance.margin < 0.0
        self._anchors = -self._identities if opposite else self._identities
        self._repel = np.full(rows, float(repel and not opposite), dtype=np.float32)
        self._attract = 1.0 - self._repel
        # One face's pairs i < j; a chunk repeats it down the diagonal.
        pairs = np.triu(np.ones((variants, variants), dtype=np.float32), 1)
        self._pairs = pairs if repel else np.zeros_like(pairs)

    def __call__(self, x0: Latent, step: Step, /) -> Latent:
        """Direction to walk away from at predicted clean latents [N·V, C, s, s], like x0."""
        gradients = [self._gradient(x0[rows], rows) for rows in self._chunks]
        return gradients[0] if len(gradients) == 1 else np.concatenate(gradients)

    def _gradient(self, x0: Latent, rows: slice) -> Latent:
        faces = len(x0) // self._variants
        gradient, _, embedding = self._programs.guide(
            x0=x0,
            anchor=self._anchors[rows],
            repel=self._repel[rows],
            attract=self._attract[rows],
            sibling=np.kron(np.eye(faces, dtype=np.float32), self._pairs),
        )
        scale = np.ones(len(x0))
        if self._guidance.normalise == "rms":
            rms = np.sqrt(np.mean(np.square(gradient, dtype=np.float64), axis=(1, 2, 3)))
            scale = np.divide(1.0, rms, out=np.zeros_like(rms), where=rms > _VANISHING_RMS)
        scale = np.where(self._released(embedding, rows), 0.0, scale)
        return (gradient * scale[:, None, None, None]).astype(np.float32)

    def _released(self, embedding: NDArray[np.float32], rows: slice) -> NDArray[np.bool_]:
        """Rows [B] that are where they should be, given their embeddings [B, E]."""
        margin = self._guidance.margin
        if margin is None:
            return np.zeros(len(embedding), dtype=np.bool_)
        similarity = np.einsum("be,be->b", embedding, self._identities[rows])
        beyond = similarity <= margin if self._guidance.mode == "repel" else similarity >= margin
        siblings = embedding.reshape(-1, self._variants, embedding.shape[-1])
        alike = np.einsum("nie,nje->nij", siblings, siblings) > 0.0
        involved = (self._pairs + self._pairs.T) > 0.0
        held = np.any(alike & involved, axis=2).reshape(-1)
        released: NDArray[np.bool_] = beyond & ~held
        return released
