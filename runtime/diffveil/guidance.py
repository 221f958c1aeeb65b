"""Identity guidance of one run: what `guide` is asked, and what is done with its answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import MAX_BATCH, chunks
from diffveil.engines import Programs
from diffveil.plans import Guidance
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
    it still resembles another variant of itself; nor is it asked again in that step.

    Args:
        programs: Programs of the bundle.
        guidance: The preset's numbers. Where they ask for ``"latent"`` and the bundle has no such
            program, the full gradient is taken, which protects no less.
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
        self._cheap = guidance.through == "latent" and programs.can("guide_latent")
        self._guide = programs.guide_latent if self._cheap else programs.guide
        self._schedule = programs.bundle.manifest.schedule
        self._guidance = guidance
        self._variants = variants
        self._max_batch = max_batch
        self._identities = np.repeat(identities, variants, axis=0)
        repel = guidance.mode == "repel"
        opposite = repel and guidance.margin is not None and guidance.margin < 0.0
        self._anchors = -self._identities if opposite else self._identities
        self._repel = float(repel and not opposite)
        # One face's pairs i < j; a chunk repeats it down the diagonal.
        pairs = np.triu(np.ones((variants, variants), dtype=np.float32), 1)
        self._pairs = pairs if repel else np.zeros_like(pairs)
        self._asked = 0
        self._last: Latent | None = None

    def __call__(self, x0: Latent, step: Step, /) -> Latent:
        """Direction to walk away from at predicted clean latents [N·V, C, s, s], like x0."""
        index, self._asked = self._asked, self._asked + 1
        if self.reuses(index) and self._last is not None:
            return self._last
        direction = np.zeros_like(x0)
        active = np.ones(len(x0) // self._variants, dtype=np.bool_)
        # What the step will subtract from the next latent moves its clean part by g/α.
        reach = step.g / self._schedule.signal(step.next_timestep)
        for repeat in range(self.repeats):
            faces = np.flatnonzero(active)
            rows = (faces[:, None] * self._variants + np.arange(self._variants)).reshape(-1)
            for part in chunks(len(rows), self._max_batch, self._variants):
                chosen = rows[part]
                at = x0[chosen] - np.float32(reach) * direction[chosen] if repeat else x0[chosen]
                gradient, pushed = self._gradient(at, chosen)
                direction[chosen] += gradient
                still = pushed.reshape(-1, self._variants).any(axis=1)
                active[chosen[:: self._variants] // self._variants] = still
            if not active.any():
                break
        self._last = direction
        return direction

    def question(self, rows: NDArray[np.intp]) -> dict[str, NDArray[np.float32]]:
        """What program `guide` is asked for whole faces' rows [B], beside the latents."""
        repel = np.full(len(rows), self._repel, dtype=np.float32)
        faces = np.eye(len(rows) // self._variants, dtype=np.float32)
        return {
            "anchor": self._anchors[rows],
            "repel": repel,
            "attract": np.float32(1.0) - repel,
            "sibling": np.kron(faces, self._pairs),
        }

    def reuses(self, index: int) -> bool:
        """Whether the guided step at that position, from 0, takes the last direction again."""
        return self._guidance.reuse and index % self._guidance.every != 0

    @property
    def program(self) -> str:
        """Name of the program that is asked."""
        return "guide_latent" if self._cheap else "guide"

    @property
    def repeats(self) -> int:
        """Gradients a step."""
        siblings = self._variants > 1 and self._guidance.mode == "repel"
        return max(self._guidance.repeats, self._guidance.sibling_repeats if siblings else 1)

    @property
    def variants(self) -> int:
        """Rows of a face."""
        return self._variants

    @property
    def normalise(self) -> bool:
        """Whether gradients become of unit size."""
        return self._guidance.normalise == "rms"

    @property
    def release(self) -> float:
        """The margin as program `step` takes it; see `diffveil.engines.Programs.step_loop`."""
        margin = self._guidance.margin
        if margin is None:
            return 2.0  # no cosine reaches it
        # Repelling by attraction to the opposite embedding turns the cosine's sign once more.
        return margin if self._guidance.mode == "attract" else -margin

    def _gradient(self, x0: Latent, rows: NDArray[np.intp]) -> tuple[Latent, NDArray[np.bool_]]:
        """Gradient at latents [B, C, s, s] of those rows, and which of them it pushes, [B]."""
        gradient, _, embedding = self._guide(x0=x0, **self.question(rows))
        scale = np.ones(len(x0))
        if self.normalise:
            rms = np.sqrt(np.mean(np.square(gradient, dtype=np.float64), axis=(1, 2, 3)))
            scale = np.divide(1.0, rms, out=np.zeros_like(rms), where=rms > _VANISHING_RMS)
        released = self._released(embedding, self._identities[rows])
        scale = np.where(released, 0.0, scale)
        return (gradient * scale[:, None, None, None]).astype(np.float32), ~released

    def _released(
        self, embedding: NDArray[np.float32], identities: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Rows [B] that are where they should be, given their embeddings [B, E]."""
        margin = self._guidance.margin
        if margin is None:
            return np.zeros(len(embedding), dtype=np.bool_)
        similarity = np.einsum("be,be->b", embedding, identities)
        beyond = similarity <= margin if self._guidance.mode == "repel" else similarity >= margin
        siblings = embedding.reshape(-1, self._variants, embedding.shape[-1])
        alike = np.einsum("nie,nje->nij", siblings, siblings) > 0.0
        involved = (self._pairs + self._pairs.T) > 0.0
        held = np.any(alike & involved, axis=2).reshape(-1)
        released: NDArray[np.bool_] = beyond & ~held
        return released
