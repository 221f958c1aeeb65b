"""Aligned faces that carry their own way back: the noise of one face, mapped, drawn as another.

A face's latent z is led up the probability-flow ODE to its noise map x, x is moved by a keyed
orthogonal map, and led down again: another face, from which whoever has the key undoes all of it.
The closest published relative is arXiv 2510.01031.

What a picture can carry decides how it is done:

* One latent, not the pair that O-BELM and BDIA need. So the sampler is DDIM, and its inverse is
  DDIM's own step solved for its input (`_Flow.up`), which is exact rather than approximate.
* No stage tokens. The unconditional conditioning serves both ways.
* Only the face is replaced, so only its cells are carried. All other cells follow a path that both
  sides know: the latent of the surroundings with the face smoothed over, noised with fixed noise.
* The picture is rounded and perhaps compressed. `CarriedFaces.reveal` looks for the latent whose
  decoding *looks* like the picture, which is closer to what was drawn than the encoder's answer.

Axes: N faces, C channels and s side of a latent, n = C · cells carried, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import in_chunks
from diffveil.errors import EngineError, OptionError
from diffveil.keyedmap import KeyedMap
from diffveil.masks import cell_mask, face_mask, latent_mask, smoothed_over
from diffveil.noise import NoiseKey, normal
from diffveil.operations import FaceOperations
from diffveil.samplers import Step
from diffveil.samplers.ddim import ddim_step
from diffveil.sampling import Latent, Progress, add_noise
from diffveil.schedule import NoiseSchedule, uniform_nodes

__all__ = ["CarriedFaces"]

_F32: TypeAlias = NDArray[np.float32]
_Overlay = Callable[[_F32], _F32]

_COVERED = 0.5  # share of a latent cell's pixels that must be face's for the cell to be carried
_STEPS = 4  # more of them smear errors wider: each is a nonlinear map between picture and noise
_SOLVE = 5  # iterations that solve one step; the error falls about tenfold with each two
_LOOK = 3  # iterations that fit a latent to a picture
# Noise maps of photographs are about this much larger than unit Gaussians; drawn as they are, they
# become faces of too much contrast, off the manifold that the autoencoder knows, and carry worse.
_NOISE_SCALE = 1.12


class CarriedFaces:
    """Turns aligned faces into faces that carry them, and back.

    Args:
        operations: The operations on crops.
    """

    def __init__(self, operations: FaceOperations) -> None:
        self._programs = operations.programs
        self._max_batch = operations.max_batch
        self._bundle = bundle = operations.bundle
        side = bundle.dimensions.latent_size
        face = latent_mask(face_mask(bundle.image_size, bundle.template), side)
        self._cells = face > _COVERED
        self._size = int(self._cells.sum()) * bundle.dimensions.latent_channels

    @cached_property
    def mask(self) -> _F32:
        """Where a carrying face replaces the photo: float32 [S, S], 0 … 1, 1 over what carries."""
        return cell_mask(self._cells, self._bundle.image_size)

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser that `conceal` makes, and `reveal` too."""
        return _STEPS * (_SOLVE + 1) + _STEPS

    def conceal(
        self, crops: _F32, keys: Sequence[NoiseKey], *, progress: Progress | None = None
    ) -> _F32:
        """Other faces, which carry these.

        Args:
            crops: Faces, float32 [N, 3, S, S] in [-1, 1].
            keys: One key a face; see `KeyedMap`.
            progress: Called after each step.

        Returns:
            Float32 [N, 3, S, S] in [-1, 1]. Only what `mask` covers is meant to be used.

        Raises:
            OptionError: There is not one key a face.
            EngineError: A program failed.
        """
        maps = self._maps(crops, keys)
        latents = self._encode(crops)
        flow = self._flow(crops, progress)
        noise = self._carried(flow.up(latents)).reshape(len(crops), -1)
        moved = [one.apply(x) for one, x in zip(maps, noise, strict=True)]
        return self._decode(flow.down(self._spread(np.stack(moved) / np.float32(_NOISE_SCALE))))

    def reveal(
        self,
        crops: _F32,
        keys: Sequence[NoiseKey],
        *,
        overlay: _Overlay | None = None,
        progress: Progress | None = None,
    ) -> _F32:
        """The faces that these carry; with other keys, faces of nobody.

        Args:
            crops: Carrying faces in their surroundings, float32 [N, 3, S, S] in [-1, 1].
            keys: One key a face.
            overlay: Puts on drawn crops what the picture bears besides the face.
            progress: Called after each step.

        Returns:
            Float32 [N, 3, S, S] in [-1, 1].

        Raises:
            OptionError: There is not one key a face.
            EngineError: A program failed.
        """
        maps = self._maps(crops, keys)
        flow = self._flow(crops, progress)
        latents = self._look(crops, flow, overlay)
        noise = self._carried(flow.up(latents)).reshape(len(crops), -1)
        moved = [one.undo(x) for one, x in zip(maps, noise, strict=True)]
        return self._decode(flow.down(self._spread(np.stack(moved) * np.float32(_NOISE_SCALE))))

    def _look(self, crops: _F32, flow: _Flow, overlay: _Overlay | None) -> Latent:
        """Latents whose decodings encode to the same as the pictures do: a fixed point."""
        seen = self._encode(crops)
        latents = flow.clamped(seen, flow.clean)
        for _ in range(_LOOK):
            drawn = crops + self.mask * (self._decode(latents) - crops)
            if overlay is not None:
                drawn = overlay(drawn)
            latents = flow.clamped(latents + seen - self._encode(drawn), flow.clean)
        return latents

    def _maps(self, crops: _F32, keys: Sequence[NoiseKey]) -> list[KeyedMap]:
        if len(keys) != len(crops):
            raise OptionError(
                f"received {len(keys)} keys for {len(crops)} faces, expected one each"
            )
        return [KeyedMap(key, self._size) for key in keys]

    def _flow(self, crops: _F32, progress: Progress | None) -> _Flow:
        around = self._encode(smoothed_over(crops, self.mask))
        return _Flow(self._denoise, self._bundle.manifest.schedule, around, self._cells, progress)

    def _denoise(self, x: Latent, timestep: int) -> Latent:
        constant = self._bundle.unconditional
        return in_chunks(
            self._programs.denoise,
            self._max_batch,
            latent=x,
            timestep=np.full(len(x), timestep, dtype=np.int64),
            conditioning=np.broadcast_to(constant, (len(x), *constant.shape[1:])),
        )

    def _encode(self, crops: _F32) -> Latent:
        return in_chunks(self._programs.encode, self._max_batch, image=crops)

    def _decode(self, latents: Latent) -> _F32:
        images = in_chunks(self._programs.decode, self._max_batch, latent=latents)
        return np.clip(images, -1.0, 1.0)

    def _carried(self, latents: Latent) -> _F32:
        """The cells that are carried, [N, C, s, s] to [N, C, cells]."""
        return latents[:, :, self._cells]

    def _spread(self, values: _F32) -> Latent:
        """Values [N, n] in their cells, all other cells zero, [N, C, s, s]."""
        d = self._bundle.dimensions
        shape = (len(values), d.latent_channels, d.latent_size, d.latent_size)
        latents = np.zeros(shape, dtype=np.float32)
        latents[:, :, self._cells] = values.reshape(len(values), d.latent_channels, -1)
        return latents


class _Flow:
    """The probability-flow ODE with all cells but the carried ones on a known path.

    Args:
        denoise: Noise in latents [N, C, s, s] at a timestep.
        schedule: Noise schedule of the model.
        around: Latents of the surroundings, [N, C, s, s].
        cells: The carried cells, bool [s, s].
        progress: Called after each step.
    """

    def __init__(
        self,
        denoise: Callable[[Latent, int], Latent],
        schedule: NoiseSchedule,
        around: Latent,
        cells: NDArray[np.bool_],
        progress: Progress | None,
    ) -> None:
        self._denoise = denoise
        self._schedule = schedule
        self._around = around
        self._cells = cells
        # Public on purpose: it hides nothing, but both sides must draw the same.
        self._noise = normal(NoiseKey.from_seed(0).derive("diffveil/v1/around"), around.shape[1:])
        self._nodes = uniform_nodes(_STEPS + 1, first=1, last=schedule.steps - 1)
        self._progress = progress
        self._done = 0

    @property
    def clean(self) -> int:
        """The least noisy node, which clean latents are taken to be at."""
        return self._nodes[0]

    def clamped(self, x: Latent, node: int) -> Latent:
        """x at a node, with the surroundings where they are at that node."""
        known = add_noise(self._schedule, self._around, self._noise, node)
        return np.where(self._cells, x, known).astype(np.float32)

    def down(self, x: Latent) -> Latent:
        """DDIM from noise maps to latents, both [N, C, s, s]."""
        x = self.clamped(x, self._nodes[-1])
        for here, there in zip(self._nodes[:0:-1], self._nodes[-2::-1], strict=True):
            step = ddim_step(self._schedule, here, there, label=here)
            x = self.clamped(_sum(step, x, self._denoise(x, here)), there)
            self._stepped()
        return x

    def up(self, z: Latent) -> Latent:
        """Noise maps that `down` leads to latents z.

        Each step x ↦ a·x + b·ε(x) is solved for x by x ← (z − b·ε(x)) / a, which converges because
        b is small against a where ε changes fast (Pan et al., "Effective Real Image Editing with
        Accelerated Iterative Diffusion Inversion", arXiv 2309.04907).
        """
        z = self.clamped(z, self._nodes[0])
        for there, here in zip(self._nodes[:-1], self._nodes[1:], strict=True):
            # The same line through (ε, x) in the other direction.
            step = ddim_step(self._schedule, there, here, label=here)
            x = z
            for _ in range(_SOLVE + 1):
                x = self.clamped(_sum(step, z, self._denoise(x, here)), here)
                self._stepped()
            z = x
        return z

    def _stepped(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, _STEPS * (_SOLVE + 2))


def _sum(step: Step, x: Latent, epsilon: Latent) -> Latent:
    total = step.a0 * x.astype(np.float64) + step.b0 * epsilon.astype(np.float64)
    result = total.astype(np.float32)
    if not np.isfinite(result).all():
        raise EngineError(
            f"carry: the latent is not finite after timestep {step.timestep}; "
            "if the programs run in float16, use a bundle or backend of higher precision"
        )
    return result
