"""Which shapes an engine takes: one optimisation profile over a range of batch sizes.

One profile with min < opt < max rather than one profile for each size: a photo has any number of
faces, and sizes between the named ones must run too. TensorRT-RTX specialises its kernels for the
shapes it meets when it runs, so the range costs nothing there; TensorRT tunes for `opt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffveil.engines.records import ShapeRange
from diffveil.errors import EngineError, OptionError
from diffveil.programs import Dimensions, ProgramSpec

__all__ = ["BatchRange", "profile_of"]

_MAX_BATCH = 1024


@dataclass(frozen=True)
class BatchRange:
    """Sizes of the dynamic axis (B, or N of `expand`): smallest, tuned for, largest."""

    min: int
    opt: int
    max: int

    @classmethod
    def of(cls, sizes: Sequence[int]) -> BatchRange:
        """One to three sizes in any order: smallest, middle (of two: the larger), largest.

        Raises:
            OptionError: There are none, more than three, repeated ones, or one is out of range.
        """
        ordered = sorted(sizes)
        problems = []
        if not 1 <= len(ordered) <= 3:
            problems.append("expected one to three sizes: the smallest, the usual, the largest")
        if len(set(ordered)) != len(ordered):
            problems.append("a size appears twice")
        if any(not 1 <= size <= _MAX_BATCH for size in ordered):
            problems.append(f"expected sizes in 1…{_MAX_BATCH}")
        if problems:
            raise OptionError(f"batch: received {list(sizes)}: " + "; ".join(problems))
        return cls(ordered[0], ordered[len(ordered) // 2], ordered[-1])


def profile_of(
    spec: ProgramSpec,
    dimensions: Dimensions,
    batch: BatchRange,
    network: Mapping[str, Sequence[int]],
) -> dict[str, ShapeRange]:
    """Shapes of every input of a parsed network.

    Args:
        spec: The program's declaration; every dynamic axis of it follows the batch, so `sibling`
            [B, B] of `guide` has the batch twice.
        dimensions: Sizes of the bundle's fixed axes.
        batch: The batch sizes.
        network: Shapes of the network's inputs by name, -1 for a dynamic axis.

    Raises:
        EngineError: The network's inputs are not those of the program; all problems are named.
    """
    declared = {tensor.name: tensor.shape(dimensions) for tensor in spec.inputs}
    problems = [f"{name}: not an input of the program" for name in network if name not in declared]
    profile = {}
    for name, shape in declared.items():
        if name not in network:
            # The exporter may drop an input that changes no output.
            continue
        expected = tuple(-1 if isinstance(size, str) else size for size in shape)
        if tuple(network[name]) != expected:
            problems.append(f"{name}: received {list(network[name])}, expected {list(expected)}")
        profile[name] = ShapeRange(
            *(
                tuple(rows if isinstance(size, str) else size for size in shape)
                for rows in (batch.min, batch.opt, batch.max)
            )
        )
    if not network:
        problems.append("the network has no inputs")
    if problems:
        raise EngineError(
            f"program '{spec.name}' does not have the shapes that it declares: "
            + "; ".join(problems)
            + "; export the bundle again"
        )
    return profile
