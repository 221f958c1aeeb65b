"""Cases of the runtime alone: every program, every operation of every preset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from benchmarks._session import Session
from benchmarks._timing import Way, clock, in_turns
from diffveil.noise import NoiseKey
from diffveil.plans import Preset
from diffveil.presets import PRESETS
from diffveil.programs import ALL_PROGRAMS, Dimensions, ProgramSpec

__all__ = ["OPERATIONS_EXCLUDE", "feed", "operation_ways", "operations", "programs"]

_BATCHES = (1, 8)
OPERATIONS_EXCLUDE = "loading, detection, alignment, pasting back, files"


def feed(spec: ProgramSpec, dimensions: Dimensions, batch: int) -> dict[str, Any]:
    """Inputs of a program drawn from the standard normal distribution, timesteps uniformly."""
    rng = np.random.default_rng(batch)
    inputs: dict[str, Any] = {}
    for tensor in spec.inputs:
        shape = [batch if isinstance(n, str) else n for n in tensor.shape(dimensions)]
        if tensor.dtype == "int64":
            inputs[tensor.name] = rng.integers(0, 1000, shape)
        else:
            inputs[tensor.name] = rng.standard_normal(shape, dtype=np.float32)
    return inputs


def programs(session: Session) -> None:
    """Every program of the bundle, one face and eight at a time."""
    loaded, dimensions = session.protector.programs, session.protector.bundle.dimensions
    for name in session.protector.bundle.manifest.programs:
        engine = loaded.engine(name)
        ways = {
            batch: clock(partial(engine.run, **feed(ALL_PROGRAMS[name], dimensions, batch)))
            for batch in _BATCHES
        }
        times = in_turns(
            {str(batch): way for batch, way in ways.items()},
            session.seconds / 4,
            fewest=session.fewest,
        )
        for batch in _BATCHES:
            session.keep(
                f"program/{name}",
                {session.provider: times[str(batch)]},
                faces=batch,
                excluded="loading",
            )


def operation_ways(session: Session, preset: Preset, faces: int = 1) -> Mapping[str, Way]:
    """The operations of a preset on that many faces at once, by name."""
    operations, crops = session.protector.operations, session.crops(faces)
    keys = [NoiseKey.from_seed(index) for index in range(faces)]
    tokens, latents = operations.invert(crops, preset.recovery)

    def with_key() -> object:
        batch = operations.prepare(crops)
        operations.invert(batch, preset.recovery)
        return operations.anonymize(batch, preset.anonymize, keys=keys)

    return {
        "anonymize": clock(partial(operations.anonymize, crops, preset.anonymize, keys=keys)),
        "anonymize with key": clock(with_key),
        "hide": clock(partial(operations.hide, crops, preset.hide, keys=keys)),
        "recover": clock(partial(operations.recover, tokens, latents, preset.recovery)),
    }


def operations(session: Session) -> None:
    """Every operation of every preset on one aligned face; all of them take turns."""
    ways = dict(_all_operations(session))
    times = in_turns(ways, session.seconds, fewest=session.fewest)
    for (preset, operation), seconds in times.items():
        session.keep(
            f"operation/{operation}",
            {session.provider: seconds},
            preset=preset,
            excluded=OPERATIONS_EXCLUDE,
        )


def _all_operations(session: Session) -> Iterator[tuple[tuple[str, str], Way]]:
    for name, preset in PRESETS.items():
        if session.quick and name == "paper":
            continue
        for operation, way in operation_ways(session, preset).items():
            yield (name, operation), way
