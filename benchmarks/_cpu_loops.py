"""The sampling loop of one plan in every form that a CPU can run it in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from diffveil.batching import MAX_BATCH
from diffveil.bundle import Bundle
from diffveil.denoising import Denoiser
from diffveil.engines import Engine, Loop, Programs
from diffveil.engines._loop import STEP_CARRY, PlainLoop
from diffveil.fused import Background, run_fused
from diffveil.guidance import IdentityGuidance
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.plans import Plan
from diffveil.presets import PRESETS
from diffveil.programs import ALL_PROGRAMS
from diffveil.sampling import add_noise, run
from diffveil.schedule import NoiseSchedule
from diffveil_export.assembly import Assembly
from diffveil_export.step import StepGraphs

__all__ = ["LoopCase", "plan_of", "unrolled"]

_F32 = NDArray[np.float32]
_CHANGING = ("timestep", "conditioning", "coefficients", "background", "mask")
"""Inputs of `step` that another step has other values of."""


def plan_of(steps: int) -> Plan:
    """The fast plan of anonymize with one gradient at every step, in that many steps.

    Through the latent recognizer where a bundle has one, as `step` is fused; for every face.

    Raises:
        ValueError: It cannot make that number of steps.
    """
    fast = PRESETS["fast"].anonymize
    guidance = replace(fast.guidance, repeats=1, window=(0, 1000), through="latent", margin=None)
    plan = replace(fast, guidance=guidance)
    for asked in range(steps, 1000):
        plan = replace(plan, steps=asked)
        if len(plan.table(NoiseSchedule()).steps) == steps:
            return plan
    raise ValueError(f"no plan makes {steps} steps")


def unrolled(bundle: Bundle, graphs: StepGraphs, steps: int) -> Path:
    """Write a graph of that many steps beside the weights of a bundle; returns its path.

    Its inputs are those of `step`; those that change are named `<input>_<position>`.
    """
    whole, spec = Assembly(bundle.dimensions), ALL_PROGRAMS["step"]
    given = {t.name: whole.input(t) for t in spec.inputs if t.name not in _CHANGING}
    for index in range(steps):
        given |= {
            t.name: whole.input(t, f"{t.name}_{index}") for t in spec.inputs if t.name in _CHANGING
        }
        made = graphs.append(whole, given)
        given |= {"previous": given["latent"], "latent": made["next"]}
        given["previous_epsilon"] = made["epsilon"]
    path = bundle.path / f"unrolled-{steps}.onnx"
    ir.save(whole.model([(spec.outputs[0], made["next"])]), path)
    return path


class _PlainPrograms(Programs):
    """The same engines, but loops of them are ordinary calls that copy in and out."""

    def __init__(self, programs: Programs) -> None:
        super().__init__(programs.bundle, programs.backend)
        self._others = programs

    def engine(self, program: str) -> Engine:
        return self._others.engine(program)

    def held(self, programs: Iterable[str]) -> AbstractContextManager[None]:
        return self._others.held(programs)

    def step_loop(self, rows: int) -> Loop:
        return PlainLoop(self.engine("step"), STEP_CARRY)


class LoopCase:
    """One plan on random faces, and every way of running it.

    Args:
        programs: Of a bundle with `step`.
        plan: What to run.
        faces: Rows.
        session: ONNX Runtime session of the graph that `unrolled` made for as many steps.
    """

    def __init__(self, programs: Programs, plan: Plan, faces: int, session: Any) -> None:
        self._programs, self._session = programs, session
        self._plain = _PlainPrograms(programs)
        operations = FaceOperations(programs)
        rng = np.random.default_rng(faces)
        size = programs.bundle.image_size
        batch = operations.prepare(rng.uniform(-1, 1, (faces, 3, size, size)).astype(np.float32))
        schedule = operations.schedule
        self._table = plan.table(schedule)
        keys = [NoiseKey.from_seed(face) for face in range(faces)]
        noise = operations.start_noise(keys, 1)[:, 0]
        self._x = add_noise(schedule, batch.latents, noise, self._table.start_timestep)
        above = plan.conditional_above
        timesteps = self._table.timesteps
        distilled = programs.can("denoise_few")  # as `step` is fused
        self._denoise = Denoiser(
            programs, batch.tokens, timesteps, conditional_above=above, distilled=distilled
        )
        self._guidance = IdentityGuidance(programs, plan.guidance, batch.identities)
        self._background = Background(schedule, plan, batch.latents, noise, batch.masks)
        self._feed = self._unrolled_inputs()

    def ways(self) -> dict[str, Callable[[], _F32]]:
        """Functions that run the loop and give its last latents; the first is today's default."""
        return {
            "separate programs": self._separate,
            "the same again": self._separate,
            "fused step, plain calls": lambda: self._fused(self._plain),
            "fused step, bound buffers": lambda: self._fused(self._programs),
            "unrolled into one graph": self._unrolled,
        }

    def _separate(self) -> _F32:
        blend = self._background
        x, _ = run(self._table, self._x, self._denoise, gradient=self._guidance, blend=blend)
        return x

    def _fused(self, programs: Programs) -> _F32:
        return run_fused(
            programs,
            self._table,
            self._x,
            self._denoise,
            self._guidance,
            noise=lambda _: np.zeros_like(self._x),
            background=self._background,
            max_batch=MAX_BATCH,
        )

    def _unrolled(self) -> _F32:
        (x,) = self._session.run(None, self._feed)
        return np.asarray(x)

    def _unrolled_inputs(self) -> dict[str, NDArray[Any]]:
        """Made beforehand, which flatters this way by what it would take to make them."""
        rows, x = len(self._x), self._x
        feed: dict[str, NDArray[Any]] = {
            "latent": x,
            "previous": x,
            "previous_epsilon": np.zeros_like(x),
            "noise": np.zeros_like(x),
            **self._guidance.question(np.arange(rows)),
            "release": np.full(rows, self._guidance.release, dtype=np.float32),
            "normalise": np.full(rows, self._guidance.normalise, dtype=np.float32),
        }
        for index, step in enumerate(self._table.steps):
            kept = self._background.at(step)
            ones = np.ones((rows, 1, *x.shape[2:]), dtype=np.float32)
            feed |= {
                f"timestep_{index}": np.full(rows, step.timestep, dtype=np.int64),
                f"conditioning_{index}": self._denoise.conditioning(step.timestep, rows),
                f"coefficients_{index}": np.tile(
                    np.array(step.coefficients, np.float32), (rows, 1)
                ),
                f"background_{index}": np.zeros_like(x) if kept is None else kept,
                f"mask_{index}": ones if kept is None else self._background.mask,
            }
        used = {i.name for i in self._session.get_inputs()}
        return {name: np.ascontiguousarray(a) for name, a in feed.items() if name in used}
