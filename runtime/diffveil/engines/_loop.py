"""Programs that feed themselves: what a loop asks of a backend, and one for any backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias, cast, runtime_checkable

import numpy as np

from diffveil.engines._base import Array, Engine
from diffveil.errors import EngineError
from diffveil.programs import ProgramSpec

__all__ = [
    "STEP_CARRY",
    "Carry",
    "Loop",
    "LoopingEngine",
    "PlainLoop",
    "Scheduled",
    "WholeLoop",
    "check_put",
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
        order: Which of them each call takes.
    """

    values: tuple[Array, ...]
    order: tuple[int, ...]


@runtime_checkable
class WholeLoop(Protocol):
    """What a loop has beside `Loop` if all of its calls can be handed over at once.

    It holds resources of the backend until it is closed.
    """

    def put(self, **inputs: Array) -> None:
        """See `Loop.put`."""
        ...

    def run(self, schedule: Mapping[str, Scheduled], calls: int) -> None:
        """Call the program that often and carry its outputs over, without waiting for any call.

        Args:
            schedule: What changes from call to call; all else was put.
            calls: Number of calls; each of `schedule` has as many.

        Raises:
            EngineError: An input has no value, or is not as declared, or execution failed.
        """
        ...

    def get(self, output: str) -> Array:
        """A copy of what the last call returned under that name; waits for it."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


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
