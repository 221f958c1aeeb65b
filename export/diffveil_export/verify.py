"""Parity of programs with PyTorch: random inputs, and the comparison that an export rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from diffveil.engines import Engine
from diffveil.errors import DiffveilError
from diffveil.parity import OutputParity, compare, describe
from diffveil.programs import Dimensions, ProgramSpec, TensorSpec

__all__ = [
    "ParityError",
    "check_program",
    "random_inputs",
    "random_tensor",
    "require_parity",
]


class ParityError(DiffveilError):
    """An exported program computes something else than PyTorch does."""


def random_inputs(
    spec: ProgramSpec, dimensions: Dimensions, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Inputs of a program as a pipeline might give them, in order, on the CPU.

    Images are smooth and fill [-1, 1], latents and tokens normal, anchors unit vectors, weights
    and masks uniform in [0, 1], timesteps uniform over the schedule.
    """
    return tuple(random_tensor(t, dimensions, batch, generator) for t in spec.inputs)


def random_tensor(
    tensor: TensorSpec, dimensions: Dimensions, batch: int, generator: torch.Generator
) -> torch.Tensor:
    """One input as a pipeline might give it; see `random_inputs`."""
    shape = [batch if isinstance(n, str) else n for n in tensor.shape(dimensions)]
    if tensor.name == "timestep":
        return torch.randint(0, 1000, shape, generator=generator)
    if tensor.name == "image":
        coarse = torch.randn(batch, 3, 4, 4, generator=generator)
        size = (dimensions.image_size, dimensions.image_size)
        return nn.functional.interpolate(coarse, size, mode="bilinear").tanh()
    if tensor.name in ("repel", "attract", "sibling", "coefficients", "mask", "reach"):
        return torch.rand(shape, generator=generator)
    if tensor.name == "release":  # some rows are beyond it, some are not
        return torch.rand(shape, generator=generator) - 0.5
    if tensor.name in ("normalise", "keep"):
        return torch.randint(0, 2, shape, generator=generator).float()
    value = torch.randn(shape, generator=generator)
    return nn.functional.normalize(value, dim=1) if tensor.name == "anchor" else value


def check_program(
    module: nn.Module,
    engine: Engine,
    dimensions: Dimensions,
    *,
    precision: str = "float32",
    batches: Sequence[int] = (1, 3),
    seed: int = 20,
) -> tuple[OutputParity, ...]:
    """Run a program and its PyTorch module on fresh random inputs and compare all outputs.

    Args:
        module: The program's wrapper; for `guide` the eager one, so autograd is the reference.
        engine: The program.
        dimensions: Sizes of the bundle.
        precision: What the program computes in.
        batches: Batch sizes to try.
        seed: Seed of the inputs; must not be that of the example inputs of tracing.
    """
    spec = engine.program
    rows = []
    for batch in batches:
        generator = torch.Generator().manual_seed(seed + batch)
        inputs = random_inputs(spec, dimensions, batch, generator)
        with torch.no_grad():
            expected = module(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        actual = engine.run(**{t.name: x.numpy() for t, x in zip(spec.inputs, inputs, strict=True)})
        rows += [
            compare(
                spec.name,
                tensor.name,
                batch,
                value.numpy(),
                _floats(actual[tensor.name]),
                precision,
            )
            for tensor, value in zip(spec.outputs, expected, strict=True)
        ]
    return tuple(rows)


def _floats(array: NDArray[np.generic]) -> NDArray[np.floating[Any]]:
    """Programs return nothing else."""
    return cast("NDArray[np.floating[Any]]", array)


def require_parity(rows: Sequence[OutputParity]) -> None:
    """Raise unless every row agrees.

    Raises:
        ParityError: Lists the outputs that do not.
    """
    bad = describe(rows)
    if bad:
        raise ParityError(f"above the tolerance of its precision: {bad}")
