"""The loop of `diffveil.sampling.run` as one piece of work for a device, whatever the table.

The networks stay the programs that they are; `predict`, `steer` and `advance` compute between them
what the loop computes in NumPy. So a backend is handed all calls of all steps at once, and waits
for nothing before the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.batching import chunks
from diffveil.denoising import Denoiser
from diffveil.engines import Carry, Programs, Scheduled, WholeLoop
from diffveil.fused import Background, finite
from diffveil.guidance import IdentityGuidance
from diffveil.samplers import SamplerTable
from diffveil.sampling import Latent, Progress, check_run, run

__all__ = ["run_anywhere"]

_CARRIES: dict[str, Carry] = {
    "steer": (("steered", "direction"),),
    "advance": (("next", "latent", "previous"), ("epsilon", "previous_epsilon")),
}

_Inputs: TypeAlias = "dict[str, NDArray[Any]]"
_Call: TypeAlias = "tuple[str, _Inputs]"
"""A program, and those of its inputs that other calls have others of, for all rows."""


def run_anywhere(
    programs: Programs,
    table: SamplerTable,
    x: Latent,
    denoise: Denoiser,
    *,
    x_prev: Latent | None = None,
    guidance: IdentityGuidance | None = None,
    noise: Callable[[int], Latent] | None = None,
    background: Background | None = None,
    max_batch: int,
    progress: Progress | None = None,
) -> tuple[Latent, Latent]:
    """Run a sampler table: on the device, if the backend takes loops over the bundle's programs.

    Where it gains nothing by that or the bundle lacks the programs, by `diffveil.sampling.run`.

    Sums on the device are float32, where `diffveil.sampling.run` sums in float64 and rounds once:
    a table and its inverse then differ by a few roundings a step rather than one.

    Args:
        programs: Programs of a bundle.
        table: Sampler, with guidance weights.
        x: Latents at ``table.start_timestep``, [N·V, C, s, s], float32. Not changed.
        denoise: Says which program predicts, and what rows are conditioned on.
        x_prev: Second latents, like x, for tables that start from a pair.
        guidance: Says what the guide is asked, for tables with guidance weights.
        noise: Fresh unit Gaussian noise for the step at that position, like x.
        background: What to replace the background with, if at all.
        max_batch: Most rows of one call.
        progress: Called for every step; on the device once all are done.

    Returns:
        The latents at the table's last node and at the one before it, each like x.

    Raises:
        OptionError: The table needs a pair, noise or guidance that is not given, or shapes differ.
        EngineError: A program failed on the last backend, or latents are no longer finite.
    """
    check_run(table, x, x_prev, guidance, noise)

    def here() -> tuple[Latent, Latent]:
        return run(
            table,
            x,
            denoise,
            x_prev=x_prev,
            gradient=guidance,
            noise=noise,
            blend=background,
            progress=progress,
        )

    if not (programs.takes_loops and programs.can("advance")):
        return here()
    calls = _calls(programs, table, x, denoise, guidance, noise, background)
    parts = chunks(len(x), max_batch, 1 if guidance is None else guidance.variants)
    pair = x, x if x_prev is None else x_prev

    names = tuple(dict.fromkeys(name for name, _ in calls))

    def work() -> tuple[Latent, Latent] | None:
        results = []
        with programs.held(names):
            for part in parts:
                loop = programs.whole_loop(names, part.stop - part.start, _CARRIES)
                if loop is None:  # the backend that took over takes none
                    return None
                # One at a time: a loop holds a stream, and there may be but one.
                with closing(loop):
                    results.append(_run_part(loop, calls, pair, guidance, part))
        after, before = (np.concatenate(latents) for latents in zip(*results, strict=True))
        return finite(table, after), before

    result = programs.attempt(work)
    if result is None:
        return here()
    if progress is not None:
        for done in range(len(table.steps)):
            progress(done + 1, len(table.steps))
    return result


def _calls(
    programs: Programs,
    table: SamplerTable,
    x: Latent,
    denoise: Denoiser,
    guidance: IdentityGuidance | None,
    noise: Callable[[int], Latent] | None,
    background: Background | None,
) -> list[_Call]:
    """All calls of a run in order, each with the inputs that other calls have others of."""
    rows, nothing = len(x), np.zeros_like(x)
    everywhere = np.ones((rows, 1, *x.shape[2:]), dtype=np.float32)
    calls: list[_Call] = []
    asked = 0
    for index, step in enumerate(table.steps):
        coefficients = np.tile(np.array(step.coefficients, np.float32), (rows, 1))
        timestep = np.full(rows, step.timestep, dtype=np.int64)
        conditioning = denoise.conditioning(step.timestep, rows)
        calls.append((denoise.program, {"timestep": timestep, "conditioning": conditioning}))
        if step.g != 0.0 and guidance is not None:
            if not guidance.reuses(asked):
                # What the step will subtract from the next latent moves its clean part by g/α.
                reach = step.g / programs.bundle.manifest.schedule.signal(step.next_timestep)
                calls += _asking(guidance, coefficients, reach)
            asked += 1
        kept = None if background is None else background.at(step)
        blend = (
            (nothing, everywhere) if background is None or kept is None else (kept, background.mask)
        )
        fresh = nothing if step.n == 0.0 or noise is None else noise(index)
        calls.append(
            (
                "advance",
                {
                    "coefficients": coefficients,
                    "noise": fresh,
                    "background": blend[0],
                    "mask": blend[1],
                },
            )
        )
    return calls


def _asking(
    guidance: IdentityGuidance, coefficients: NDArray[np.float32], reach: float
) -> list[_Call]:
    """The calls that gather a step's direction, each gradient taken where the last one led.

    Faces that are beyond the margin are asked again, unlike in `IdentityGuidance`: they have not
    moved, so they are released again.
    """
    calls: list[_Call] = []
    for repeat in range(guidance.repeats):
        # The first gradient of a step starts from where nothing was gathered.
        some = np.full(len(coefficients), float(repeat > 0), dtype=np.float32)
        calls.append(("predict", {"coefficients": coefficients, "reach": np.float32(reach) * some}))
        calls.append((guidance.program, {}))
        calls.append(("steer", {"keep": some}))
    return calls


def _run_part(
    loop: WholeLoop,
    calls: Sequence[_Call],
    pair: tuple[Latent, Latent],
    guidance: IdentityGuidance | None,
    part: slice,
) -> tuple[Latent, Latent]:
    """Run all calls with a part of the rows; gives its last latents and those before."""
    x, x_prev = pair[0][part], pair[1][part]
    if guidance is not None and any(name == "steer" for name, _ in calls):
        rows = np.arange(part.start, part.stop)
        loop.put(
            **guidance.question(rows),
            release=np.full(len(rows), guidance.release, dtype=np.float32),
            normalise=np.full(len(rows), guidance.normalise, dtype=np.float32),
        )
    zeros = np.zeros_like(x)
    loop.put(latent=x, previous=x_prev, previous_epsilon=zeros, direction=zeros)
    changing: _Inputs = {}
    for _, inputs in calls:
        changing = {**inputs, **changing}
    schedule = {
        name: Scheduled.of([inputs.get(name, other) for _, inputs in calls], part)
        for name, other in sorted(changing.items())
    }
    loop.run(schedule, [name for name, _ in calls])
    after, before = loop.get("latent"), loop.get("previous")
    return np.asarray(after, np.float32), np.asarray(before, np.float32)
