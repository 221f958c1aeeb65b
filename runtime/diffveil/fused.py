"""The loop of `diffveil.sampling.run` through program `step`, one call a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
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

__all__ = ["Background", "can_run_fused", "finite", "run_fused"]

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
        and guidance.repeats == guidance.sibling_repeats == 1
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
    fused = _FusedRun(table, x, denoise, guidance, noise, background, progress)
    parts = chunks(len(x), max_batch, guidance.variants)

    def work() -> Latent:
        with programs.held(["step"]):
            return finite(table, fused.run(programs, parts))

    # A backend that fails in the middle has lost the loop's tensors: the next one begins anew.
    return programs.attempt(work)


def finite(table: SamplerTable, latents: Latent) -> Latent:
    """The latents that a loop on a device arrived at.

    What is not finite stays so: looking once is enough, and nothing waits for it in between.

    Raises:
        EngineError: They are not finite.
    """
    if not np.isfinite(latents).all():
        raise EngineError(
            f"{table.name}: the latent is not finite; if the programs run in float16, use a bundle "
            "or backend of higher precision"
        )
    return latents


@dataclass(frozen=True, eq=False)
class _FusedRun:
    """What a run puts into its loops, whoever runs them; arguments as of `run_fused`."""

    table: SamplerTable
    x: Latent
    denoise: Denoiser
    guidance: IdentityGuidance
    noise: Callable[[int], Latent]
    background: Background | None
    progress: Progress | None

    def run(self, programs: Programs, parts: list[slice]) -> Latent:
        """All parts of the rows; at once, or one after the other where steps are handed over."""
        first = programs.step_loop(parts[0].stop - parts[0].start)
        if isinstance(first, WholeLoop):
            return np.concatenate(self._handed_over(programs, first, parts))
        others = [programs.step_loop(part.stop - part.start) for part in parts[1:]]
        return np.concatenate(self._step_by_step([first, *others], parts))

    def _step_by_step(self, loops: list[Loop], parts: list[slice]) -> list[Latent]:
        """All parts side by side, a step at a time; what stays as it was is not put again."""
        for loop, part in zip(loops, parts, strict=True):
            self._start(loop, part)
        before: _Changes = {}
        for index, step in enumerate(self.table.steps):
            now = self._changes(index, step)
            for loop, part in zip(loops, parts, strict=True):
                loop.put(**{n: a[part] for n, a in now.items() if a is not before.get(n)})
                loop.step()
            before = now
            self._report(index + 1)
        return [np.asarray(loop.get("next"), np.float32) for loop in loops]

    def _handed_over(
        self, programs: Programs, first: WholeLoop, parts: list[slice]
    ) -> list[Latent]:
        """One part after the other, each with all of its steps at once."""
        results = []
        with closing(first):  # whatever happens before its turn; closing twice does no harm
            steps = [self._changes(index, step) for index, step in enumerate(self.table.steps)]
            for part in parts:
                loop = first if part is parts[0] else programs.step_loop(part.stop - part.start)
                if not isinstance(loop, WholeLoop):
                    raise EngineError("another backend took over within a run")
                # One at a time: a loop holds a stream, and there may be but one.
                with closing(loop):
                    self._start(loop, part)
                    schedule = {
                        name: Scheduled.of([step[name] for step in steps], part)
                        for name in steps[0]
                    }
                    loop.run(schedule, ["step"] * len(steps))
                    results.append(np.asarray(loop.get("next"), np.float32))
        for done in range(len(steps)):
            self._report(done + 1)
        return results

    def _start(self, loop: Loop | WholeLoop, part: slice) -> None:
        """Put what stays for the whole run."""
        rows, x = np.arange(part.start, part.stop), self.x[part]
        loop.put(
            latent=x,
            previous=x,
            previous_epsilon=np.zeros_like(x),
            **self.guidance.question(rows),
            release=np.full(len(rows), self.guidance.release, dtype=np.float32),
            normalise=np.full(len(rows), self.guidance.normalise, dtype=np.float32),
        )

    def _changes(self, index: int, step: Step) -> _Changes:
        """What other steps have others of, for all rows."""
        rows = len(self.x)
        background, mask = self._nothing
        if self.background is not None:
            kept = self.background.at(step)
            if kept is not None:
                background, mask = kept, self.background.mask
        return {
            "timestep": np.full(rows, step.timestep, dtype=np.int64),
            "conditioning": self.denoise.conditioning(step.timestep, rows),
            "coefficients": np.tile(np.array(step.coefficients, np.float32), (rows, 1)),
            "noise": self._nothing[0] if step.n == 0.0 else self.noise(index),
            "background": background,
            "mask": mask,
        }

    @cached_property
    def _nothing(self) -> tuple[Latent, Latent]:
        """Zeros and ones: x comes out of a blend with them as it went in, bit for bit."""
        ones = np.ones((len(self.x), 1, *self.x.shape[2:]), dtype=np.float32)
        return np.zeros_like(self.x), ones

    def _report(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, len(self.table.steps))
