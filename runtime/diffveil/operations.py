"""The operations on aligned face crops: batched arrays in, arrays out; no files, no photos.

They follow He et al., "Diff-Privacy: Diffusion-based Face Privacy Protection", arXiv 2309.05330.
Symbols: key-E are a face's stage tokens, key-I is the noise map of its latent.

Axes: N faces, V variants of each, S side of a crop, C channels and s side of a latent, E width of
an embedding, D width of a token, K latents of a noise map. Crops are RGB in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import MAX_BATCH, in_chunks
from diffveil.denoising import Denoiser
from diffveil.drawing import FaceDrawing
from diffveil.engines import Programs
from diffveil.errors import OptionError
from diffveil.facebatch import Crops, FaceBatch
from diffveil.noise import NoiseKey
from diffveil.plans import Inversion, Plan
from diffveil.sampling import Latent, Progress
from diffveil.wholeloops import run_anywhere

__all__ = ["FaceOperations"]

_F32: TypeAlias = NDArray[np.float32]


class FaceOperations:
    """anonymize, hide, invert, recover and embed on batches of aligned crops.

    A face's result depends on its own crop and noise key only, not on the rest of the batch (but
    for the last bits of floating-point sums, which backends order by batch size).

    Args:
        programs: Programs of the bundle.
        max_batch: Most rows of one program call; the variants of one face are never split. By
            default as many as pay, or as the backend's engines take.
    """

    def __init__(self, programs: Programs, *, max_batch: int | None = None) -> None:
        if max_batch is None:
            limit = programs.max_batch
            max_batch = MAX_BATCH if limit is None else min(MAX_BATCH, limit)
        if max_batch < 1:
            raise OptionError(f"max_batch is {max_batch}, expected at least 1")
        self.programs = programs
        self.bundle = programs.bundle
        self.schedule = self.bundle.manifest.schedule
        self.max_batch = max_batch
        self._drawing = FaceDrawing(programs, max_batch)

    def prepare(self, crops: _F32, landmarks: NDArray[np.float64] | None = None) -> FaceBatch:
        """Crops [N, 3, S, S] with room for what several operations ask about them.

        Args:
            crops: Faces, float32 [N, 3, S, S] in [-1, 1].
            landmarks: Where each face's landmarks lie in its crop, float64 [N, 5, 2]: turned heads
                are replaced up to their far cheek only. By default where the template has them.

        Raises:
            OptionError: The crops are not float32 [N, 3, S, S], or the landmarks not [N, 5, 2].
        """
        return FaceBatch(self.programs, crops, self.max_batch, landmarks)

    def anonymize(
        self,
        crops: Crops,
        plan: Plan,
        *,
        keys: Sequence[NoiseKey],
        variants: int = 1,
        progress: Progress | None = None,
    ) -> _F32:
        """Faces that nobody recognises.

        Args:
            crops: Faces, float32 [N, 3, S, S] in [-1, 1], or a batch of them.
            plan: Steps and guidance; its guidance repels.
            keys: One noise key a face, used for nothing else.
            variants: Number V of different results for each face.
            progress: Called after each step.

        Returns:
            Float32 [N, V, 3, S, S] in [-1, 1].

        Raises:
            OptionError: An argument is out of range, or the plan attracts.
            EngineError: A program failed.
        """
        return self._protect("anonymize", "repel", crops, plan, keys, variants, progress)

    def hide(
        self,
        crops: Crops,
        plan: Plan,
        *,
        keys: Sequence[NoiseKey],
        variants: int = 1,
        progress: Progress | None = None,
    ) -> _F32:
        """Faces that people do not recognise and the bundle's recognizer does.

        Arguments, result and errors are those of `anonymize`, but the plan's guidance attracts.
        """
        return self._protect("hide", "attract", crops, plan, keys, variants, progress)

    def disguise(
        self,
        crops: Crops,
        plan: Plan,
        *,
        anchors: _F32,
        keys: Sequence[NoiseKey],
        progress: Progress | None = None,
    ) -> _F32:
        """Faces that are led to other identities.

        Args:
            crops: Faces, float32 [N, 3, S, S] in [-1, 1], or a batch of them.
            plan: Steps and guidance; its guidance attracts.
            anchors: The identities, float32 [N, E], unit length.
            keys: Noise key of each face. Faces that shall look alike may share one.
            progress: Called after each step.

        Returns:
            Float32 [N, 3, S, S] in [-1, 1].

        Raises:
            OptionError: An argument is out of range, or the plan repels.
            EngineError: A program failed.
        """
        faces = self._batch(crops)
        if anchors.shape != (len(faces), self.bundle.dimensions.embedding_width):
            raise OptionError(
                f"disguise: anchors are {list(anchors.shape)}, expected one for each of "
                f"{len(faces)} faces, {self.bundle.dimensions.embedding_width} wide"
            )
        images = self._protect("disguise", "attract", faces, plan, keys, 1, progress, anchors)
        return images[:, 0]

    def invert(
        self,
        crops: Crops,
        inversion: Inversion,
        *,
        tokens: _F32 | None = None,
        progress: Progress | None = None,
    ) -> tuple[_F32, Latent]:
        """The two parts of a recovery key: stage tokens and noise map.

        Args:
            crops: Faces, float32 [N, 3, S, S] in [-1, 1], or a batch of them.
            inversion: Sampler and steps.
            tokens: Tokens to invert with, float32 [N, 10, D]; by default those of the crops.
            progress: Called after each step.

        Returns:
            Tokens, float32 [N, 10, D]; latents, float32 [N, K, C, s, s], the noisiest first.

        Raises:
            OptionError: An argument is out of range.
            EngineError: A program failed.
        """
        faces = self._batch(crops)
        table = inversion.forward(self.schedule)
        tokens = faces.tokens if tokens is None else tokens
        denoise = Denoiser(self.programs, tokens, table.timesteps, max_batch=self.max_batch)
        noisiest, before = run_anywhere(
            self.programs,
            table,
            faces.latents,
            denoise,
            max_batch=self.max_batch,
            progress=progress,
        )
        latents = (noisiest, before)[: inversion.latents]
        return tokens, np.stack(latents, axis=1)

    def recover(
        self,
        tokens: _F32,
        latents: Latent,
        inversion: Inversion,
        *,
        progress: Progress | None = None,
    ) -> _F32:
        """Faces out of what `invert` returned.

        Args:
            tokens: Float32 [N, 10, D], or conditionings [N, 10, T, W], which are not expanded.
            latents: Float32 [N, K, C, s, s], the noisiest first.
            inversion: Sampler and steps that they were made with.
            progress: Called after each step.

        Returns:
            Float32 [N, 3, S, S] in [-1, 1].

        Raises:
            OptionError: Tokens and latents do not fit the bundle, the inversion or each other.
            EngineError: A program failed.
        """
        self._check_noise_map(tokens, latents, inversion)
        table = inversion.recovery(self.schedule)
        denoise = Denoiser(self.programs, tokens, table.timesteps, max_batch=self.max_batch)
        # The way back enters a pair from its other end.
        x, x_prev = (latents[:, 1], latents[:, 0]) if table.needs_pair else (latents[:, 0], None)
        clean, _ = run_anywhere(
            self.programs,
            table,
            x,
            denoise,
            x_prev=x_prev,
            max_batch=self.max_batch,
            progress=progress,
        )
        return self._decode(clean)

    def embed(self, crops: Crops) -> _F32:
        """What the bundle's recognizer sees in faces [N, 3, S, S]: float32 [N, E], unit length.

        Raises:
            OptionError: The crops are not float32 [N, 3, S, S].
            EngineError: A program failed.
        """
        return self._batch(crops).identities

    def start_noise(self, keys: Sequence[NoiseKey], variants: int = 1) -> Latent:
        """Unit Gaussian noise that faces start from, float32 [N, V, C, s, s]."""
        return self._drawing.start_noise(keys, variants)

    def _protect(
        self,
        operation: str,
        mode: str,
        crops: Crops,
        plan: Plan,
        keys: Sequence[NoiseKey],
        variants: int,
        progress: Progress | None,
        anchors: _F32 | None = None,
    ) -> _F32:
        faces = self._batch(crops)
        self._check_protect(operation, mode, plan, len(faces), len(keys), variants)
        plan = plan.fitting(self.programs.can("denoise_few"), self.bundle.has_surrogates)
        return self._drawing.faces(
            faces,
            plan,
            keys=keys,
            variants=variants,
            apart=operation != "hide",
            anchors=anchors,
            progress=progress,
        )

    def _decode(self, latents: Latent) -> _F32:
        images = in_chunks(self.programs.decode, self.max_batch, latent=latents)
        return np.clip(images, -1.0, 1.0)

    def _batch(self, crops: Crops) -> FaceBatch:
        return crops if isinstance(crops, FaceBatch) else self.prepare(crops)

    def _check_protect(
        self, operation: str, mode: str, plan: Plan, faces: int, keys: int, variants: int
    ) -> None:
        problems = []
        if plan.guidance.mode != mode:
            # A swapped plan would publish the identity that it should remove.
            problems.append(f"the plan's guidance is {plan.guidance.mode!r}, expected {mode!r}")
        if keys != faces:
            problems.append(f"received {keys} noise keys for {faces} faces, expected one each")
        if not 1 <= variants <= self.max_batch:
            problems.append(f"variants is {variants}, expected 1 to {self.max_batch}")
        if problems:
            raise OptionError(f"{operation}: " + "; ".join(problems))

    def _check_noise_map(self, tokens: _F32, latents: Latent, inversion: Inversion) -> None:
        d = self.bundle.dimensions
        faces = len(tokens)
        expanded = tokens.ndim == 4
        width = [d.conditioning_length, d.conditioning_width] if expanded else [d.token_width]
        wanted = {
            "tokens": (tokens, [faces, d.stages, *width]),
            "latents": (
                latents,
                [faces, inversion.latents, d.latent_channels, d.latent_size, d.latent_size],
            ),
        }
        problems = [
            f"{name}: received {array.dtype} {list(array.shape)}, expected float32 {shape}"
            for name, (array, shape) in wanted.items()
            if array.dtype != np.float32 or list(array.shape) != shape
        ]
        if not faces:
            problems.append("tokens: received no faces, expected at least one")
        if problems:
            raise OptionError("recover: " + "; ".join(problems))
