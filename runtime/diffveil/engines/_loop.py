"""Programs that feed themselves: what a loop asks of a backend, and one for any backend."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np

from diffveil.engines._base import Array, Engine
from diffveil.errors import EngineError
from diffveil.programs import ProgramSpec

__all__ = [
    "STEP_CARRY",
    "Carry",
    "JoiningEngine",
    "Loop",
    "LoopingEngine",
    "PlainLoop",
    "Scheduled",
    "WholeLoop",
    "check_put",
    "joined",
    "lacking",
    "loop_of",
]

Carry: TypeAlias = Sequence[Sequence[str]]
"""Chains of names: an output, then the inputs that hold its last value, the one before, and so on.

In a chain, every call's output moves into the first input, that input's old value into the second.
"""

STEP_CARRY: Carry = (("next", "latent", "previous"), ("epsilon", "previous_epsilon"))
"""How a sampler's step follows on the one before."""


class Loop(Protocol):
    """One run of a program that feeds itself. For one thread."""

    def put(self, **inputs: Array) -> None:
        """Copy values into inputs; they hold until they are put again or carried over.

        Args:
            **inputs: One array an input, shaped and typed as the program declares.

        Raises:
            EngineError: Names, dtypes or shapes differ from the declaration.
        """
        ...

    def step(self) -> None:
        """Call the program once and carry its outputs over.

        Raises:
            EngineError: An input has no value yet, or execution failed.
        """
        ...

    def get(self, output: str) -> Array:
        """A copy of what the last call returned under that name."""
        ...


@dataclass(frozen=True)
class Scheduled:
    """What one input is in each call of a loop.

    Attributes:
        values: Its different values, shaped and typed as the program declares.
        order: Which of them each call takes; anything where a call has no such input.
    """

    values: tuple[Array, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, calls: Sequence[Array], rows: slice) -> Scheduled:
        """Some rows of one array a call; what is the same memory is the same value."""
        values: dict[tuple[Any, ...], Array] = {}
        keys = []
        for array in calls:
            key = array.__array_interface__["data"][0], array.shape, array.strides
            values.setdefault(key, array[rows])
            keys.append(key)
        known = {key: position for position, key in enumerate(values)}
        return cls(tuple(values.values()), tuple(known[key] for key in keys))


@runtime_checkable
class WholeLoop(Protocol):
    """A loop over one or several programs, all of whose calls are handed over at once.

    Tensors of one name are one tensor, whichever programs have it. A loop holds resources of the
    backend until it is closed.
    """

    def put(self, **inputs: Array) -> None:
        """See `Loop.put`."""
        ...

    def run(self, schedule: Mapping[str, Scheduled], calls: Sequence[str]) -> None:
        """Call programs in turn, each carrying its outputs over, without waiting for any call.

        Args:
            schedule: What changes from call to call; all else was put or is an output of before.
            calls: The program of each call; each of `schedule` has as many entries.

        Raises:
            EngineError: An input has no value, or is not as declared, or execution failed.
        """
        ...

    def get(self, output: str) -> Array:
        """A copy of the last output of that name, or of what was carried over; waits for it."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


def joined(programs: Sequence[ProgramSpec]) -> ProgramSpec:
    """The declaration of a loop over programs: the tensors of all, each once."""
    names = ", ".join(dict.fromkeys(p.name for p in programs))
    inputs = {t.name: t for p in programs for t in p.inputs}
    outputs = {t.name: t for p in programs for t in p.outputs}
    return ProgramSpec(names, "a loop", tuple(inputs.values()), tuple(outputs.values()))


def lacking(
    programs: Mapping[str, tuple[Collection[str], Collection[str]]],
    carries: Mapping[str, Carry],
    calls: Sequence[str],
    known: Iterable[str],
) -> set[str]:
    """Inputs that would have no value when they are needed.

    Args:
        programs: Names of the inputs and outputs of each program.
        carries: How the outputs of each become inputs.
        calls: The program of each call.
        known: Names that have a value at the start, or are given with each call.
    """
    have, missing = set(known), set()
    for program in dict.fromkeys(calls):  # what a program lacks it lacks the first time
        inputs, outputs = programs[program]
        missing |= set(inputs) - have
        have |= set(outputs)
        for chain in carries.get(program, ()):
            have.add(chain[1])
    return missing


def check_put(
    program: ProgramSpec, inputs: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Hold arrays that are put into a loop against the program's declaration.

    Args:
        program: The program.
        inputs: Arrays by name.
        shapes: Shape of every input.

    Raises:
        EngineError: Names, dtypes or shapes differ; all are named.
    """
    dtypes = {t.name: np.dtype(t.dtype) for t in program.inputs}
    problems = []
    for name, array in inputs.items():
        if name not in dtypes:
            problems.append(f"{name}: not an input")
        elif array.shape != shapes[name] or array.dtype != dtypes[name]:
            problems.append(
                f"{name}: received {array.dtype} {list(array.shape)}, "
                f"expected {dtypes[name]} {list(shapes[name])}"
            )
    if problems:
        raise EngineError(
            f"a loop of program '{program.name}' was fed wrongly: " + "; ".join(problems)
        )


@runtime_checkable
class LoopingEngine(Protocol):
    """What an engine has beside `Engine` if it can keep a loop's tensors where it computes."""

    def loop(self, rows: int, carry: Carry) -> Loop:
        """Set aside room for calls with that many rows."""
        ...


@runtime_checkable
class JoiningEngine(Protocol):
    """What an engine has beside `Engine` if loops over it and others are worth handing over."""

    def join(
        self, others: Sequence[Engine], rows: int, carries: Mapping[str, Carry]
    ) -> WholeLoop | None:
        """A loop over its program and those of other engines of the backend.

        Args:
            others: The other engines.
            rows: Size of the dynamic axis in every call.
            carries: How the outputs of each program become inputs, by name; none if left out.

        Returns:
            The loop; None where the engines cannot share one.
        """
        ...


class PlainLoop:
    """A loop of ordinary calls, for any engine.

    Args:
        engine: Executes the program.
        carry: How outputs become inputs.
    """

    def __init__(self, engine: Engine, carry: Carry) -> None:
        self._engine, self._carry = engine, carry
        self._inputs: dict[str, Array] = {}
        self._outputs: dict[str, Array] = {}

    def put(self, **inputs: Array) -> None:
        """See `Loop.put`; shapes are judged when the program is called."""
        # Copied: the caller may go on writing to its arrays.
        self._inputs |= {name: np.array(array) for name, array in inputs.items()}

    def step(self) -> None:
        """See `Loop.step`."""
        self._outputs = self._engine.run(**self._inputs)
        before = self._inputs | self._outputs
        for chain in self._carry:
            for source, name in pairwise(chain):
                self._inputs[name] = before[source]

    def get(self, output: str) -> Array:
        """See `Loop.get`."""
        if output not in self._outputs:
            raise EngineError(f"'{output}' is no output of a call that was made")
        return cast(Array, self._outputs[output].copy())


def loop_of(engine: Engine, rows: int, carry: Carry) -> Loop:
    """A loop on an engine: in the backend's own memory if it can, by ordinary calls if not.

    Args:
        engine: Executes the program.
        rows: Size of the dynamic axis in every call.
        carry: How outputs become inputs.
    """
    if isinstance(engine, LoopingEngine):
        return engine.loop(rows, carry)
    return PlainLoop(engine, carry)
