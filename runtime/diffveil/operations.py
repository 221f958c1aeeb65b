"""The operations on aligned face crops: batched arrays in, arrays out; no files, no photos.

They follow He et al., "Diff-Privacy: Diffusion-based Face Privacy Protection", arXiv 2309.05330.
Symbols: key-E are a face's stage tokens, key-I is the noise map of its latent.

Axes: N faces, V variants of each, S side of a crop, C channels and s side of a latent, E width of
an embedding, D width of a token, K latents of a noise map. Crops are RGB in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import MAX_BATCH, in_chunks
from diffveil.denoising import Denoiser
from diffveil.engines import Programs
from diffveil.errors import OptionError
from diffveil.facebatch import Crops, FaceBatch
from diffveil.fused import Background, can_run_fused, run_fused
from diffveil.guidance import IdentityGuidance
from diffveil.masks import face_mask
from diffveil.noise import NoiseKey, normal
from diffveil.plans import Inversion, Plan
from diffveil.samplers import SamplerTable, retrace
from diffveil.sampling import Latent, Progress, add_noise, run
from diffveil.surrogates import Surrogates
from diffveil.tones import match_tones
from diffveil.wholeloops import run_whole

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

    def prepare(self, crops: _F32) -> FaceBatch:
        """Crops [N, 3, S, S] with room for what several operations ask about them.

        Raises:
            OptionError: The crops are not float32 [N, 3, S, S].
        """
        return FaceBatch(self.programs, crops, self.max_batch)

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
        noisiest, before = self._unguided(table, faces.latents, denoise, progress=progress)
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
        if table.needs_pair:
            # The way back enters the pair from its other end.
            x, x_prev = latents[:, 1], latents[:, 0]
            clean, _ = self._unguided(table, x, denoise, x_prev, progress)
        else:
            clean, _ = self._unguided(table, latents[:, 0], denoise, progress=progress)
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
        noise = self._noise(keys, variants, "diffveil/v1/start")
        return noise.reshape(len(keys), variants, *noise.shape[1:])

    def _step_noise(self, keys: Sequence[NoiseKey], variants: int, index: int) -> Latent:
        """Unit Gaussian noise that a stochastic sampler adds at a step, [N·V, C, s, s]."""
        return self._noise(keys, variants, "diffveil/v1/step", index)

    @cached_property
    def _surrogates(self) -> Surrogates:
        return Surrogates.load(self.bundle)

    def _noise(self, keys: Sequence[NoiseKey], variants: int, label: str, *indices: int) -> Latent:
        d = self.bundle.dimensions
        shape = (d.latent_channels, d.latent_size, d.latent_size)
        noise = [
            normal(key.derive(label, variant, *indices), shape)
            for key in keys
            for variant in range(variants)
        ]
        return np.stack(noise)

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
        table = plan.table(self.schedule)
        clean = np.repeat(faces.latents, variants, axis=0)
        noise = self.start_noise(keys, variants).reshape(clean.shape)
        surrogates = None
        if plan.surrogate:
            surrogates = self._surrogates.choose(
                faces.tokens, faces.identities, keys, variants=variants, apart=operation != "hide"
            ).reshape(-1, *faces.tokens.shape[1:])
        denoise = Denoiser(
            self.programs,
            faces.tokens,
            table.timesteps,
            conditional_above=plan.conditional_above,
            surrogates=surrogates,
            max_batch=self.max_batch,
            distilled=plan.distilled,
        )
        if plan.fresh_noise < 1.0:
            own = np.repeat(self._own_noise(faces, denoise.undistilled(), table), variants, axis=0)
            noise = _mixed(own, noise, plan.fresh_noise)
        x = add_noise(self.schedule, clean, noise, table.start_timestep)
        gradient = None
        if any(step.g != 0.0 for step in table.steps):  # else nobody need be recognised
            gradient = IdentityGuidance(
                self.programs,
                plan.guidance,
                faces.identities if anchors is None else anchors,
                variants=variants,
                max_batch=self.max_batch,
            )
        background = None
        if plan.background_below:
            masks = np.repeat(faces.masks, variants, axis=0)
            background = Background(self.schedule, plan, clean, noise, masks)

        def fresh(index: int) -> Latent:
            return self._step_noise(keys, variants, index)

        denoise = denoise.varied(variants)
        if gradient is not None and can_run_fused(self.programs, plan, table):
            x = run_fused(
                self.programs,
                table,
                x,
                denoise,
                gradient,
                noise=fresh,
                background=background,
                max_batch=self.max_batch,
                progress=progress,
            )
        else:
            whole = run_whole(
                self.programs,
                table,
                x,
                denoise,
                guidance=gradient,
                noise=fresh,
                background=background,
                max_batch=self.max_batch,
                progress=progress,
            )
            x, _ = whole or run(
                table,
                x,
                denoise,
                gradient=gradient,
                noise=fresh,
                blend=background,
                progress=progress,
            )
        images = self._decode(x)
        if plan.match_tones:
            crops = np.repeat(faces.crops, variants, axis=0)
            mask = face_mask(self.bundle.image_size, self.bundle.template)
            images = match_tones(images, crops, mask.astype(np.float32))
        return images.reshape(len(faces), variants, *images.shape[1:])

    def _unguided(
        self,
        table: SamplerTable,
        x: Latent,
        denoise: Denoiser,
        x_prev: Latent | None = None,
        progress: Progress | None = None,
    ) -> tuple[Latent, Latent]:
        """Run a table without guidance, noise or background; see `diffveil.sampling.run`."""
        whole = run_whole(
            self.programs,
            table,
            x,
            denoise,
            x_prev=x_prev,
            max_batch=self.max_batch,
            progress=progress,
        )
        return whole or run(table, x, denoise, x_prev=x_prev, progress=progress)

    def _own_noise(self, faces: FaceBatch, denoise: Denoiser, table: SamplerTable) -> Latent:
        """Noise [N, C, s, s] that an unguided run of the table turns into the photo itself."""
        up = retrace(self.schedule, table)
        x, _ = self._unguided(up, faces.latents, denoise)
        start = table.start_timestep
        signal, sigma = self.schedule.signal(start), self.schedule.noise(start)
        return ((x - signal * faces.latents.astype(np.float64)) / sigma).astype(np.float32)

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


def _mixed(own: Latent, fresh: Latent, share: float) -> Latent:
    """√(1 − f²)·own + f·fresh: two unit Gaussians give a unit Gaussian."""
    kept = np.multiply(own, np.sqrt(1.0 - share**2), dtype=np.float64)
    return (kept + np.multiply(fresh, share, dtype=np.float64)).astype(np.float32)
