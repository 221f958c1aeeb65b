"""Cases of growth: time and memory against sizes, and memory against the number of calls."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks._laws import fit, slopes
from benchmarks._session import Session
from benchmarks._timing import resident_bytes
from benchmarks.scaling import AXES

__all__ = ["leak", "leak_slopes", "scaling"]

_SAMPLES = 100
LEAK_CALLS = 1000


def scaling(session: Session) -> None:
    """Time and peak memory along every axis, and the law that each follows."""
    for axis in AXES:
        session.say(f"  {axis}")
        command = [sys.executable, "-m", "benchmarks.scaling", axis]
        command += ["--threads", str(session.threads), "--seconds", str(session.seconds)]
        if session.bundle is not None:
            command += ["--bundle", str(session.bundle)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        points = [json.loads(line) for line in done.stdout.splitlines()]
        case, add = f"scaling/{axis}", session.recorder.add
        for point in points:
            milliseconds = [1000 * seconds for seconds in point["seconds"]]
            size = {"size": point["size"]}
            add(case, session.provider, "time", "ms", milliseconds, **size)
            if point["peak_mib"] is not None:
                add(case, session.provider, "peak memory", "MiB", [point["peak_mib"]], **size)
        sizes = [point["size"] for point in points]
        if len(sizes) < 3:
            continue
        costs = {"time": [1000 * float(np.median(p["seconds"])) for p in points]}
        if all(point["peak_mib"] for point in points):
            costs["peak memory"] = [point["peak_mib"] for point in points]
        for metric, values in costs.items():
            law = fit(sizes, values)
            add(
                case,
                session.provider,
                f"law of {metric}",
                "exponent",
                law.exponents,
                law=str(law),
                kind=law.kind,
                first=law.first,
                second=law.second,
                residual=law.residual,
            )


def leak(session: Session) -> None:
    """Growth of this process's memory over many calls, each of one face with its key."""
    calls = LEAK_CALLS // 10 if session.quick else LEAK_CALLS
    run = partial(session.protector.anonymize, session.face, aligned=True, steps=2)
    found = leak_slopes(run, calls)
    if found is None:
        session.recorder.not_run("leak/anonymize", session.provider, "no /proc/self/status")
        return
    session.recorder.add(
        "leak/anonymize",
        session.provider,
        "growth of resident memory",
        "KiB/call",
        found / 1024,
        calls=calls,
        excluded="the first tenth of the calls",
    )


def leak_slopes(call: Callable[[], object], calls: int) -> NDArray[np.float64] | None:
    """Bytes that memory grows by a call, between all pairs of about a hundred moments.

    Returns:
        Slopes in bytes a call, the first tenth of the calls left out; None where the system does
        not tell how much memory is used.
    """
    every, at, used = max(1, calls // _SAMPLES), [], []
    for index in range(calls):
        call()
        if index >= calls // 10 and index % every == 0:
            size = resident_bytes()
            if size is None:
                return None
            at.append(index)
            used.append(size)
    return slopes(at, used)
