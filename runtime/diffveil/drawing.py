"""New faces for photos' faces: drawn, looked at, and drawn again where they came out wrong.

Axes: N faces, V variants of each, R rows (a variant of a face each), S side of a crop, C channels
and s side of a latent, E width of an embedding, D width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import in_chunks
from diffveil.denoising import Denoiser
from diffveil.engines import Programs
from diffveil.facebatch import FaceBatch
from diffveil.fused import Background, can_run_fused, run_fused
from diffveil.guidance import IdentityGuidance
from diffveil.noise import NoiseKey, normal
from diffveil.plans import Plan
from diffveil.samplers import SamplerTable, retrace
from diffveil.sampling import Latent, Progress, add_noise
from diffveil.surrogates import Surrogates
from diffveil.tones import match_tones
from diffveil.wholeloops import run_anywhere

__all__ = ["FaceDrawing"]

_F32: TypeAlias = NDArray[np.float32]


class FaceDrawing:
    """Draws faces as plans ask. Arguments have been checked.

    Args:
        programs: Programs of the bundle.
        max_batch: Most rows of one program call.
    """

    def __init__(self, programs: Programs, max_batch: int) -> None:
        self._programs, self._max_batch = programs, max_batch
        self._bundle = programs.bundle
        self._schedule = programs.bundle.manifest.schedule

    def faces(
        self,
        faces: FaceBatch,
        plan: Plan,
        *,
        keys: Sequence[NoiseKey],
        variants: int = 1,
        apart: bool,
        anchors: _F32 | None,
        progress: Progress | None = None,
    ) -> _F32:
        """Faces that the plan takes for done, or the best of as many draws as it allows.

        A face that does not meet `Plan.accept` or `Plan.natural` is drawn again with other noise,
        by itself: which faces share its batch changes nothing.

        Args:
            faces: The photos' faces.
            plan: What to do; it fits the bundle.
            keys: One noise key a face.
            variants: Number V of results for each face.
            apart: Whether surrogates are to be strangers.
            anchors: Identities that guidance leads from or to, float32 [N, E], unit length; None:
                the faces' own.
            progress: Called after each step of the first draw.

        Returns:
            Float32 [N, V, 3, S, S] in [-1, 1].

        Raises:
            EngineError: A program failed.
        """
        images = self._draw(faces, plan, keys, variants, apart, anchors, progress)
        look = _Look(self._programs, plan, self._max_batch)
        if not plan.redraws or not look.sees:
            return images.reshape(len(faces), variants, *images.shape[1:])
        anchors = faces.identities if anchors is None else anchors
        owner = np.repeat(np.arange(len(faces)), variants)
        excess, naturalness = look.at(images, faces.take(owner), anchors[owner])
        for attempt in range(plan.redraws):
            rows = np.flatnonzero((excess > 0) | (naturalness < plan.natural))
            if not len(rows):
                break
            again = [
                keys[owner[row]].derive("diffveil/v1/redraw", int(row % variants), attempt)
                for row in rows
            ]
            chosen = owner[rows]
            part = faces.take(chosen)
            drawn = self._draw(part, plan, again, 1, apart, anchors[chosen])
            e, n = look.at(drawn, part, anchors[chosen])
            # Whom it shows comes first, how it looks second.
            tied = e == excess[rows]
            better = (e < excess[rows]) | (tied & (n > naturalness[rows]))
            images[rows[better]] = drawn[better]
            excess[rows[better]], naturalness[rows[better]] = e[better], n[better]
        return images.reshape(len(faces), variants, *images.shape[1:])

    def start_noise(self, keys: Sequence[NoiseKey], variants: int = 1) -> Latent:
        """Unit Gaussian noise that faces start from, float32 [N, V, C, s, s]."""
        noise = self._noise(keys, variants, "diffveil/v1/start")
        return noise.reshape(len(keys), variants, *noise.shape[1:])

    def _draw(
        self,
        faces: FaceBatch,
        plan: Plan,
        keys: Sequence[NoiseKey],
        variants: int,
        apart: bool,
        anchors: _F32 | None,
        progress: Progress | None = None,
    ) -> _F32:
        """One draw of every face: float32 [N·V, 3, S, S] in [-1, 1]."""
        table = plan.table(self._schedule)
        clean = np.repeat(faces.latents, variants, axis=0)
        noise = self.start_noise(keys, variants).reshape(clean.shape)
        surrogates = None
        if plan.surrogate:
            share = np.float32(plan.surrogate)
            chosen = self._surrogates.choose(
                faces.tokens, faces.identities, keys, variants=variants, apart=apart
            )
            surrogates = share * chosen + (1 - share) * faces.tokens[:, None]
            surrogates = surrogates.reshape(-1, *faces.tokens.shape[1:])
        denoise = Denoiser(
            self._programs,
            faces.tokens,
            table.timesteps,
            conditional_above=plan.conditional_above,
            surrogates=surrogates,
            max_batch=self._max_batch,
            distilled=plan.distilled,
        )
        if plan.fresh_noise < 1.0:
            own = np.repeat(self._own_noise(faces, denoise.undistilled(), table), variants, axis=0)
            noise = _mixed(own, noise, plan.fresh_noise)
        x = add_noise(self._schedule, clean, noise, table.start_timestep)
        gradient = None
        if any(step.g != 0.0 for step in table.steps):  # else nobody need be recognised
            gradient = IdentityGuidance(
                self._programs,
                plan.guidance,
                faces.identities if anchors is None else anchors,
                variants=variants,
                max_batch=self._max_batch,
            )
        background = None
        if plan.background_below:
            masks = np.repeat(faces.masks, variants, axis=0)
            background = Background(self._schedule, plan, clean, noise, masks)

        def fresh(index: int) -> Latent:
            return self._step_noise(keys, variants, index)

        denoise = denoise.varied(variants)
        if gradient is not None and can_run_fused(self._programs, plan, table):
            x = run_fused(
                self._programs,
                table,
                x,
                denoise,
                gradient,
                noise=fresh,
                background=background,
                max_batch=self._max_batch,
                progress=progress,
            )
        else:
            x, _ = run_anywhere(
                self._programs,
                table,
                x,
                denoise,
                guidance=gradient,
                noise=fresh,
                background=background,
                max_batch=self._max_batch,
                progress=progress,
            )
        images = np.clip(in_chunks(self._programs.decode, self._max_batch, latent=x), -1.0, 1.0)
        if plan.match_tones:
            crops = np.repeat(faces.crops, variants, axis=0)
            images = match_tones(images, crops, np.repeat(faces.pixel_masks, variants, axis=0))
        return images

    def _step_noise(self, keys: Sequence[NoiseKey], variants: int, index: int) -> Latent:
        """Unit Gaussian noise that a stochastic sampler adds at a step, [N·V, C, s, s]."""
        return self._noise(keys, variants, "diffveil/v1/step", index)

    @cached_property
    def _surrogates(self) -> Surrogates:
        return Surrogates.load(self._bundle)

    def _noise(self, keys: Sequence[NoiseKey], variants: int, label: str, *indices: int) -> Latent:
        d = self._bundle.dimensions
        shape = (d.latent_channels, d.latent_size, d.latent_size)
        noise = [
            normal(key.derive(label, variant, *indices), shape)
            for key in keys
            for variant in range(variants)
        ]
        return np.stack(noise)

    def _own_noise(self, faces: FaceBatch, denoise: Denoiser, table: SamplerTable) -> Latent:
        """Noise [N, C, s, s] that an unguided run of the table turns into the photo itself."""
        up = retrace(self._schedule, table)
        x = run_anywhere(self._programs, up, faces.latents, denoise, max_batch=self._max_batch)[0]
        start = table.start_timestep
        signal, sigma = self._schedule.signal(start), self._schedule.noise(start)
        return ((x - signal * faces.latents.astype(np.float64)) / sigma).astype(np.float32)


class _Look:
    """Looks at drawn faces, put into their photos, as a plan asks.

    Args:
        programs: Programs of the bundle.
        plan: Says what is good enough.
        max_batch: Most rows of one program call.
    """

    def __init__(self, programs: Programs, plan: Plan, max_batch: int) -> None:
        self._programs, self._plan, self._max_batch = programs, plan, max_batch
        self._grades = plan.natural > 0.0 and programs.can("assess")

    @property
    def sees(self) -> bool:
        """Whether a face could be found wrong at all."""
        return self._grades or self._plan.accept is not None

    def at(self, images: _F32, faces: FaceBatch, anchors: _F32) -> tuple[_F32, _F32]:
        """Look at faces [R, 3, S, S] drawn for as many photos' faces.

        Args:
            images: Float32 in [-1, 1].
            faces: Whose place they take.
            anchors: Identities to leave or to reach, [R, E].

        Returns:
            By how much the cosine misses `Plan.accept`, 0 where it does not; naturalness, 1 where
            nobody asks for it. Both float32 [R].
        """
        placed = faces.crops + faces.pixel_masks * (images - faces.crops)
        excess = np.zeros(len(images), np.float32)
        if self._plan.accept is not None:
            seen = in_chunks(self._programs.recognize, self._max_batch, image=placed)
            sign = np.float32(1.0 if self._plan.guidance.mode == "repel" else -1.0)
            cosines = (seen * anchors).sum(axis=1)
            excess = np.maximum(sign * (cosines - np.float32(self._plan.accept)), np.float32(0))
        naturalness = np.ones(len(images), np.float32)
        if self._grades:
            grades = in_chunks(self._programs.assess, self._max_batch, image=placed)
            naturalness = np.array(grades)  # an engine's own array may be read-only
        return excess, naturalness


def _mixed(own: Latent, fresh: Latent, share: float) -> Latent:
    """√(1 − f²)·own + f·fresh: two unit Gaussians give a unit Gaussian."""
    kept = np.multiply(own, np.sqrt(1.0 - share**2), dtype=np.float64)
    return (kept + np.multiply(fresh, share, dtype=np.float64)).astype(np.float32)
