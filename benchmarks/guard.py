"""Ratios that hold on every machine, so that a change which makes something slow fails a test.

    python -m benchmarks.guard

Both sides of a ratio run in turns in one process, on one thread, and what counts is the CPU time of
this process or of the interpreters that it started: other processes hardly disturb that. Limits lie
far enough above what is usual that only something like twice the work crosses them, and a guard
fails only if it does so at every attempt. A guard does not see time that is spent waiting.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks._cases_ours import feed
from benchmarks._timing import Way, in_turns
from diffveil.bundle import Bundle
from diffveil.engines import Backend, ONNXRuntimeCPU, Programs
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.presets import PRESETS
from diffveil.programs import ALL_PROGRAMS

__all__ = ["ATTEMPTS", "GUARDS", "Guard", "Guarded", "Verdict", "judge"]

ATTEMPTS = 3
_BATCH = 8
_TURNS = 3
_IMPORTS = 5


@dataclass(frozen=True)
class Guarded:
    """What is held against the limits.

    Attributes:
        bundle: Of the reference family, for the comparison with PyTorch.
        backend: Runs its programs on one thread.
        imports: What an app writes.
    """

    bundle: Bundle
    backend: Backend
    imports: str = "import diffveil"


@dataclass(frozen=True)
class Guard:
    """A ratio and what it may be at most.

    Attributes:
        limit: Highest ratio that passes.
        measure: Measures it.
        usual: What it was when the limit was chosen.
    """

    limit: float
    measure: Callable[[Guarded], float]
    usual: float


@dataclass(frozen=True)
class Verdict:
    """The lowest ratio of all attempts, and whether it is within the limit."""

    ratio: float
    limit: float

    def __bool__(self) -> bool:
        return self.ratio <= self.limit


def judge(guard: Guard, guarded: Guarded, attempts: int = ATTEMPTS) -> Verdict:
    """Measure until the limit is kept, at most so many times."""
    lowest = float("inf")
    for _ in range(attempts):
        lowest = min(lowest, guard.measure(guarded))
        if lowest <= guard.limit:
            break
    return Verdict(lowest, guard.limit)


def _cpu(call: Callable[[], object]) -> Way:
    def way() -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    return way


def _ratio(ways: Mapping[str, Way], weights: Mapping[str, float]) -> float:
    """Median over turns of `over` against the weighted sum of the others."""
    times = in_turns(ways, 0.0, fewest=_TURNS)
    reference = sum(weight * times[name] for name, weight in weights.items())
    return float(np.median(times["over"] / reference))


def _fast_over_paper(guarded: Guarded) -> float:
    import torch

    from benchmarks._paper import PaperCase

    size = guarded.bundle.image_size
    crop = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    paper = PaperCase(guarded.bundle, crop)
    images = crop.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
    # One draw: whether noise is redrawn is luck, not speed.
    plan, keys = replace(PRESETS["fast"].anonymize, redraws=0), [NoiseKey.from_seed(0)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Programs(guarded.bundle, guarded.backend) as programs:
            fast = _cpu(partial(FaceOperations(programs).anonymize, images, plan, keys=keys))
            fast()  # loads
            reference = _cpu(paper.one)()
            return float(np.median([fast() for _ in range(_TURNS)])) / reference
    finally:
        torch.set_num_threads(threads)


def _guide_over_forward(guarded: Guarded) -> float:
    calls = {"over": "guide", "decode": "decode", "recognize": "recognize"}
    return _programs_ratio(guarded, calls, {"decode": 1, "recognize": 1})


def _programs_ratio(
    guarded: Guarded, calls: Mapping[str, str], weights: Mapping[str, float]
) -> float:
    with Programs(guarded.bundle, guarded.backend) as programs:
        ways = {
            name: _cpu(partial(programs.engine(program).run, **_inputs(guarded, program, 1)))
            for name, program in calls.items()
        }
        return _ratio(ways, weights)


def _batch_over_single(program: str, guarded: Guarded) -> float:
    with Programs(guarded.bundle, guarded.backend) as programs:
        run = programs.engine(program).run
        ways = {
            "over": _cpu(partial(run, **_inputs(guarded, program, _BATCH))),
            "single": _cpu(partial(run, **_inputs(guarded, program, 1))),
        }
        return _ratio(ways, {"single": _BATCH})


def _inputs(guarded: Guarded, program: str, batch: int) -> dict[str, Any]:
    return feed(ALL_PROGRAMS[program], guarded.bundle.dimensions, batch)


def _import_over_numpy(guarded: Guarded) -> float:
    ways = {
        "over": partial(_interpreter, guarded.imports),
        "numpy": partial(_interpreter, "import numpy"),
        "bare": partial(_interpreter, ""),
    }
    # The bare interpreter is no part of either import.
    times = in_turns(ways, 0.0, fewest=_IMPORTS)
    own, numpy = (np.median(times[name] - times["bare"]) for name in ("over", "numpy"))
    return float(own / numpy)


def _interpreter(code: str) -> float:
    """CPU seconds of a fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


GUARDS: Mapping[str, Guard] = {
    "anonymize fast over the paper's recipe in PyTorch": Guard(1 / 9, _fast_over_paper, 1 / 19),
    "guide over decode and recognize": Guard(1.6, _guide_over_forward, 0.85),
    "denoise: one batch of eight over eight of one": Guard(
        1.6, partial(_batch_over_single, "denoise"), 0.85
    ),
    "decode: one batch of eight over eight of one": Guard(
        1.8, partial(_batch_over_single, "decode"), 1.0
    ),
    "import diffveil over import numpy": Guard(4.5, _import_over_numpy, 2.3),
}
"""By name."""


def main() -> int:
    """Measure all guards on the embedded bundle; returns 1 if one is over its limit."""
    guarded, failed = Guarded(Bundle.load(), ONNXRuntimeCPU(threads=1)), False
    for name, guard in GUARDS.items():
        verdict = judge(guard, guarded)
        failed = failed or not verdict
        word = "ok" if verdict else "TOO SLOW"
        print(f"{name}: {verdict.ratio:.3f}, at most {verdict.limit:.3f}: {word}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
