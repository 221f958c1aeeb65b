"""The denoiser of one run: program, conditioning of every stage, bounded batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import MAX_BATCH, in_chunks
from diffveil.engines import Programs
from diffveil.sampling import Latent
from diffveil.schedule import stage_of

__all__ = ["Denoiser"]


class Denoiser:
    """Predicts the noise of a batch, conditioned on each photo's own stage embeddings or others'.

    The tokens of all stages that the run will visit are expanded once, at the start.

    Args:
        programs: Programs of the bundle.
        tokens: Stage tokens, float32 [N, 10, D]; or what they expand to, [N, 10, T, W].
        timesteps: All timesteps that the run will ask for.
        conditional_above: The photo's own conditioning holds at timesteps above this, the
            surrogates' or the unconditional one at the others; -1: the photo's own everywhere.
        surrogates: Stage tokens [R, 10, D] of the others, one for each row of a batch; None: the
            unconditional conditioning.
        variants: Rows V of a face; latents come face by face, its variants together.
        max_batch: Most rows of one program call.
        distilled: Ask `denoise_few` rather than `denoise`.
    """

    def __init__(
        self,
        programs: Programs,
        tokens: NDArray[np.float32],
        timesteps: Sequence[int],
        *,
        conditional_above: int = -1,
        surrogates: NDArray[np.float32] | None = None,
        variants: int = 1,
        max_batch: int = MAX_BATCH,
        distilled: bool = False,
    ) -> None:
        self._programs = programs
        self._distilled = distilled
        self._conditional_above = conditional_above
        self._max_batch = max_batch
        self._training_steps = programs.bundle.manifest.schedule.steps
        self._variants = variants
        self._own = self._expanded(tokens, [t for t in timesteps if t > conditional_above])
        self._others: dict[int, NDArray[np.float32]] | None = None
        if surrogates is not None:
            others = [t for t in timesteps if t <= conditional_above]
            self._others = self._expanded(surrogates, others)

    def varied(self, variants: int) -> Denoiser:
        """The same for another number of rows a face; nothing is expanded again."""
        other = copy.copy(self)
        other._variants = variants
        return other

    def undistilled(self) -> Denoiser:
        """The same, asking `denoise`."""
        other = copy.copy(self)
        other._distilled = False
        return other

    @property
    def program(self) -> str:
        """Name of the program that is asked."""
        return "denoise_few" if self._distilled else "denoise"

    def __call__(self, x: Latent, timestep: int, /) -> Latent:
        """Noise in latents [N·V, C, s, s] at one timestep, like x."""
        return in_chunks(
            self._programs.denoise_few if self._distilled else self._programs.denoise,
            self._max_batch,
            latent=x,
            timestep=np.full(len(x), timestep, dtype=np.int64),
            conditioning=self.conditioning(timestep, len(x)),
        )

    def conditioning(self, timestep: int, rows: int) -> NDArray[np.float32]:
        """What all rows are conditioned on at a timestep: float32 [rows, T, W]."""
        if timestep > self._conditional_above:
            own = self._own[self._stage(timestep)]
            return own if self._variants == 1 else np.repeat(own, self._variants, axis=0)
        if self._others is not None:
            return self._others[self._stage(timestep)]
        unconditional = self._programs.bundle.unconditional
        return np.broadcast_to(unconditional, (rows, *unconditional.shape[1:]))

    def _expanded(
        self, tokens: NDArray[np.float32], timesteps: Sequence[int]
    ) -> dict[int, NDArray[np.float32]]:
        """Conditioning [R, T, W] of every stage that the timesteps are in."""
        stages = sorted({self._stage(t) for t in timesteps})
        if not stages:
            return {}
        expanded = np.ascontiguousarray(tokens[:, stages])
        if expanded.ndim == 3:
            flat = expanded.reshape(-1, expanded.shape[-1])
            expanded = in_chunks(self._programs.expand, self._max_batch, tokens=flat)
            expanded = expanded.reshape(len(tokens), len(stages), *expanded.shape[1:])
        return {stage: expanded[:, index] for index, stage in enumerate(stages)}

    def _stage(self, timestep: int) -> int:
        return stage_of(timestep, self._training_steps)
