"""Parity of programs with PyTorch, as data: the exporter records it and decides by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from diffveil._manifest import ParityEntry
from diffveil.engines import Engine
from diffveil.errors import DiffveilError
from diffveil.programs import Dimensions, ProgramSpec

__all__ = [
    "TOLERANCE",
    "OutputParity",
    "ParityError",
    "check_program",
    "compare",
    "random_inputs",
    "require_parity",
]

TOLERANCE = 1000 * float(np.finfo(np.float32).eps)
"""Largest difference allowed, relative to the largest reference value of the output.

Both sides compute in float32 in different orders. Rounding errors of a deep network grow about
with the root of the operations behind a value, here 10⁵ to 10⁶."""


class ParityError(DiffveilError):
    """An exported program computes something else than PyTorch does."""


@dataclass(frozen=True)
class OutputParity:
    """How far one output of one call is from PyTorch; see `ParityEntry` for the numbers."""

    program: str
    output: str
    batch: int
    max_abs: float
    max_rel: float
    psnr: float | None
    expected_dtype: str
    actual_dtype: str
    expected_shape: tuple[int, ...]
    actual_shape: tuple[int, ...]

    def __bool__(self) -> bool:
        """Whether dtype and shape agree and the difference is within tolerance."""
        return (
            self.expected_dtype == self.actual_dtype
            and self.expected_shape == self.actual_shape
            and self.max_rel <= TOLERANCE
        )

    def entry(self) -> ParityEntry:
        """What the manifest records."""
        return ParityEntry(self.output, self.batch, self.max_abs, self.max_rel, self.psnr)


def random_inputs(
    spec: ProgramSpec, dimensions: Dimensions, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Inputs of a program as a pipeline might give them, in order, on the CPU.

    Images are smooth and fill [-1, 1], latents and tokens normal, anchors unit vectors, weights
    uniform in [0, 1], timesteps uniform over the schedule.
    """
    tensors = []
    for tensor in spec.inputs:
        shape = [batch if isinstance(n, str) else n for n in tensor.shape(dimensions)]
        if tensor.name == "timestep":
            value = torch.randint(0, 1000, shape, generator=generator)
        elif tensor.name == "image":
            coarse = torch.randn(batch, 3, 4, 4, generator=generator)
            size = (dimensions.image_size, dimensions.image_size)
            value = nn.functional.interpolate(coarse, size, mode="bilinear").tanh()
        elif tensor.name in ("repel", "attract", "sibling"):
            value = torch.rand(shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator)
        if tensor.name == "anchor":
            value = nn.functional.normalize(value, dim=1)
        tensors.append(value)
    return tuple(tensors)


def compare(
    program: str,
    output: str,
    batch: int,
    expected: NDArray[np.floating[Any]],
    actual: NDArray[np.floating[Any]],
) -> OutputParity:
    """Compare two arrays; what is not finite counts as infinitely far."""
    max_abs = max_rel = float("inf")
    psnr: float | None = float("-inf")
    if expected.shape == actual.shape:
        reference = expected.astype(np.float64)
        if np.isfinite(actual).all() and np.isfinite(reference).all():
            difference = np.abs(actual.astype(np.float64) - reference)
            peak = float(np.abs(reference).max())
            max_abs = float(difference.max())
            max_rel = max_abs / peak if peak > 0 else (0.0 if max_abs == 0 else float("inf"))
            mse = float((difference**2).mean())
            if mse == 0:
                psnr = None
            elif peak > 0:
                psnr = float(10 * np.log10(peak**2 / mse))
    return OutputParity(
        program=program,
        output=output,
        batch=batch,
        max_abs=max_abs,
        max_rel=max_rel,
        psnr=psnr,
        expected_dtype=str(expected.dtype),
        actual_dtype=str(actual.dtype),
        expected_shape=expected.shape,
        actual_shape=actual.shape,
    )


def check_program(
    module: nn.Module,
    engine: Engine,
    dimensions: Dimensions,
    *,
    batches: Sequence[int] = (1, 3),
    seed: int = 20,
) -> tuple[OutputParity, ...]:
    """Run a program and its PyTorch module on fresh random inputs and compare all outputs.

    Args:
        module: The program's wrapper; for `guide` the eager one, so autograd is the reference.
        engine: The program.
        dimensions: Sizes of the bundle.
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
            compare(spec.name, tensor.name, batch, value.numpy(), _floats(actual[tensor.name]))
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
    bad = [
        f"{r.program}.{r.output} (batch {r.batch}): relative difference {r.max_rel:.2e}, "
        f"received {r.actual_dtype} {list(r.actual_shape)}, "
        f"expected {r.expected_dtype} {list(r.expected_shape)}"
        for r in rows
        if not r
    ]
    if bad:
        raise ParityError(f"above the tolerance of {TOLERANCE:.1e}: " + "; ".join(bad))
