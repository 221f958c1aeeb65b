"""The loop of `diffveil.sampling.run` through program `step`, one call a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import chunks
from diffveil.denoising import Denoiser
from diffveil.engines import Loop, Programs, Scheduled, WholeLoop
from diffveil.errors import EngineError
from diffveil.guidance import IdentityGuidance
from diffveil.plans import Plan
from diffveil.samplers import SamplerTable, Step
from diffveil.sampling import Latent, Progress, add_noise
from diffveil.schedule import NoiseSchedule

__all__ = ["Background", "can_run_fused", "run_fused"]

_Changes: TypeAlias = "dict[str, NDArray[Any]]"
"""Inputs of one step that other steps have others of."""


class Background:
    """Outside the face the latent becomes the photo's again, late in the run.

    Args:
        schedule: Noise schedule of the model.
        plan: Says from when on, and whether noised or clean.
        clean: The photo's latents [B, C, s, s].
        noise: What they were noised with, like them.
        mask: Where the face is, [B, 1, s, s], 0 … 1.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        plan: Plan,
        clean: Latent,
        noise: Latent,
        mask: NDArray[np.float32],
    ) -> None:
        self._schedule, self._plan = schedule, plan
        self._clean, self._noise = clean, noise
        self.mask = mask

    def at(self, step: Step) -> Latent | None:
        """What the background is after a step, [B, C, s, s]; None: whatever was made of it."""
        if step.timestep >= self._plan.background_below:
            return None
        if self._plan.background == "noised":
            return add_noise(self._schedule, self._clean, self._noise, step.next_timestep)
        return self._clean

    def __call__(self, x: Latent, step: Step, /) -> Latent:
        """The latent x after a step with its background replaced; a `diffveil.sampling.Blend`."""
        background = self.at(step)
        return x if background is None else background + self.mask * (x - background)


def can_run_fused(programs: Programs, plan: Plan, table: SamplerTable) -> bool:
    """Whether the bundle has a `step` that does what a plan asks for.

    Every step must take one gradient of its own: a step without would pay for one all the same.

    Args:
        programs: Programs of the bundle.
        plan: What is asked for.
        table: The plan's, with guidance weights.
    """
    if not programs.can("step"):
        return False
    guidance = plan.guidance
    cheap = guidance.through == "latent" and programs.can("guide_latent")
    wanted = {
        "denoise_few" if plan.distilled else "denoise",
        "guide_latent" if cheap else "guide",
    }
    return (
        wanted <= set(programs.bundle.program("step").parts)
        and guidance.repeats == 1
        and not (guidance.reuse and guidance.every > 1)
        and not table.needs_pair
        and all(step.g != 0.0 for step in table.steps)
    )


def run_fused(
    programs: Programs,
    table: SamplerTable,
    x: Latent,
    denoise: Denoiser,
    guidance: IdentityGuidance,
    *,
    noise: Callable[[int], Latent],
    background: Background | None,
    max_batch: int,
    progress: Progress | None = None,
) -> Latent:
    """Run a sampler table by program `step`; sums are float32, elsewhere they are float64.

    Args:
        programs: Programs of a bundle for which `can_run_fused`.
        table: Sampler, with guidance weights.
        x: Latents at ``table.start_timestep``, [N·V, C, s, s], float32. Not changed.
        denoise: Says what rows are conditioned on.
        guidance: Says what the guide is asked.
        noise: Fresh unit Gaussian noise for the step at that position, like x.
        background: What to replace the background with, if at all.
        max_batch: Most rows of one call.
        progress: Called after each step.

    Returns:
        The latents at the table's last node, like x.

    Raises:
        EngineError: The latents are no longer finite.
    """
    # A backend that fails in the middle has lost the loop's tensors: the next one begins anew.
    return programs.attempt(
        lambda: _run(programs, table, x, denoise, guidance, noise, background, max_batch, progress)
    )


def _run(
    programs: Programs,
    table: SamplerTable,
    x: Latent,
    denoise: Denoiser,
    guidance: IdentityGuidance,
    noise: Callable[[int], Latent],
    background: Background | None,
    max_batch: int,
    progress: Progress | None,
) -> Latent:
    ones = np.ones((len(x), 1, *x.shape[2:]), dtype=np.float32)
    zeros = np.zeros_like(x)

    def start(loop: Loop | WholeLoop, part: slice) -> None:
        rows = np.arange(part.start, part.stop)
        loop.put(
            latent=x[part],
            previous=x[part],
            previous_epsilon=zeros[part],
            **guidance.question(rows),
            release=np.full(len(rows), guidance.release, dtype=np.float32),
            normalise=np.full(len(rows), guidance.normalise, dtype=np.float32),
        )

    def changes(index: int, step: Step) -> _Changes:
        kept = None if background is None else background.at(step)
        return {
            "timestep": np.full(len(x), step.timestep, dtype=np.int64),
            "conditioning": denoise.conditioning(step.timestep, len(x)),
            "coefficients": np.tile(np.array(step.coefficients, np.float32), (len(x), 1)),
            "noise": zeros if step.n == 0.0 else noise(index),
            # Zeros and ones: x comes out of the blend as it went in, bit for bit.
            "background": zeros if kept is None else kept,
            "mask": ones if kept is None or background is None else background.mask,
        }

    parts = chunks(len(x), max_batch, guidance.variants)
    first = programs.step_loop(parts[0].stop - parts[0].start)
    if isinstance(first, WholeLoop):
        results = _handed_over(programs, first, table, parts, start, changes)
        if progress is not None:
            for done in range(len(table.steps)):
                progress(done + 1, len(table.steps))
    else:
        others = [programs.step_loop(part.stop - part.start) for part in parts[1:]]
        results = _step_by_step([first, *others], table, parts, start, changes, progress)
    result = np.concatenate(results)
    # What is not finite stays so: looking once is enough, and nothing waits for it in between.
    if not np.isfinite(result).all():
        raise EngineError(
            f"{table.name}: the latent is not finite; if the programs run in float16, use a bundle "
            "or backend of higher precision"
        )
    return result


def _step_by_step(
    loops: list[Loop],
    table: SamplerTable,
    parts: list[slice],
    start: Callable[[Loop, slice], None],
    changes: Callable[[int, Step], _Changes],
    progress: Progress | None,
) -> list[Latent]:
    """All parts side by side, a step at a time; what stays as it was is not put again."""
    for loop, part in zip(loops, parts, strict=True):
        start(loop, part)
    before: _Changes = {}
    for index, step in enumerate(table.steps):
        now = changes(index, step)
        for loop, part in zip(loops, parts, strict=True):
            loop.put(**{n: a[part] for n, a in now.items() if a is not before.get(n)})
            loop.step()
        before = now
        if progress is not None:
            progress(index + 1, len(table.steps))
    return [np.asarray(loop.get("next"), np.float32) for loop in loops]


def _handed_over(
    programs: Programs,
    first: WholeLoop,
    table: SamplerTable,
    parts: list[slice],
    start: Callable[[WholeLoop, slice], None],
    changes: Callable[[int, Step], _Changes],
) -> list[Latent]:
    """One part after the other, each with all of its steps at once."""
    steps = [changes(index, step) for index, step in enumerate(table.steps)]
    results = []
    for part in parts:
        loop = first if part is parts[0] else programs.step_loop(part.stop - part.start)
        assert isinstance(loop, WholeLoop)
        with closing(loop):
            start(loop, part)
            loop.run({name: _scheduled(steps, name, part) for name in steps[0]}, len(steps))
            results.append(np.asarray(loop.get("next"), np.float32))
    return results


def _scheduled(steps: list[_Changes], name: str, part: slice) -> Scheduled:
    """One input of all steps; what is the same memory is the same value."""
    values: dict[tuple[Any, ...], NDArray[Any]] = {}
    keys = []
    for step in steps:
        array = step[name]
        key = array.__array_interface__["data"][0], array.shape, array.strides
        values.setdefault(key, array[part])
        keys.append(key)
    known = list(values)
    return Scheduled(tuple(values.values()), tuple(known.index(key) for key in keys))
