"""Changes that make something about twice as slow fail here; `benchmarks.guard` says how."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("resource")
from benchmarks.guard import GUARDS, Guarded, judge

from diffveil.bundle import Bundle
from diffveil.engines import Availability, Engine, ONNXRuntimeCPU
from diffveil.programs import ProgramSpec

TIMES = 3
"""How often a slowed program does its work; the limits are crossed at about twice."""


@pytest.fixture(scope="module")
def guarded() -> Guarded:
    return Guarded(Bundle.load(), ONNXRuntimeCPU(threads=1))


@pytest.mark.parametrize("name", GUARDS)
def test_nothing_has_become_slow(name: str, guarded: Guarded) -> None:
    verdict = judge(GUARDS[name], guarded)
    assert verdict, f"{name}: {verdict.ratio:.3f}, at most {verdict.limit:.3f}"


class SlowedDown:
    """A backend that does some work several times over.

    Args:
        program: The program that became slow; None for all of them.
        least: Only with at least so many rows.
    """

    name = "slowed"

    def __init__(self, program: str | None, least: int = 1) -> None:
        self._backend = ONNXRuntimeCPU(threads=1)
        self._program, self._least = program, least

    def available(self) -> Availability:
        return self._backend.available()

    def load(self, bundle: Bundle, program: str) -> Engine:
        engine = self._backend.load(bundle, program)
        if self._program not in (None, program):
            return engine
        return _SlowedEngine(engine, self._least)


class _SlowedEngine:
    def __init__(self, engine: Engine, least: int) -> None:
        self._engine, self._least = engine, least

    @property
    def program(self) -> ProgramSpec:
        return self._engine.program

    def run(self, **inputs: object) -> dict[str, object]:
        rows = len(next(iter(inputs.values())))  # type: ignore[call-overload]
        for _ in range(TIMES - 1 if rows >= self._least else 0):
            self._engine.run(**inputs)
        return self._engine.run(**inputs)

    def close(self) -> None:
        self._engine.close()


SLOW_IMPORT = f"""
import time
start = time.process_time()
import diffveil
end = start + {TIMES} * (time.process_time() - start)
while time.process_time() < end:
    pass
"""


def slowdowns() -> Iterator[tuple[str, Guarded]]:
    bundle = Bundle.load()
    fast, guide, denoise, decode, imports = GUARDS
    yield fast, Guarded(bundle, SlowedDown(None))
    yield guide, Guarded(bundle, SlowedDown("guide"))
    yield denoise, Guarded(bundle, SlowedDown("denoise", least=8))
    yield decode, Guarded(bundle, SlowedDown("decode", least=8))
    yield imports, Guarded(bundle, ONNXRuntimeCPU(threads=1), SLOW_IMPORT)


@pytest.mark.parametrize(("name", "slow"), list(slowdowns()), ids=list(GUARDS))
def test_every_guard_can_fail(name: str, slow: Guarded) -> None:
    assert not judge(GUARDS[name], slow, attempts=1)
