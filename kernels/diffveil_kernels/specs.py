"""What is compiled: every kernel's parameters, constants and warps, in one table.

The parameters are the kernel's own in order. A compiled kernel takes the hidden ones of its Triton
version after them; its record says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["PARTS", "SPECS", "TARGETS", "KernelSpec"]

TARGETS = (80, 86, 87, 89, 90, 100, 120)
"""Compute capabilities that kernels are compiled for: 8.0 … 12.0."""

PARTS = 8
"""Partial sums of a row's squares."""


@dataclass(frozen=True)
class KernelSpec:
    """One kernel as it is compiled.

    Attributes:
        name: Unique; the file name of what is compiled.
        module: Where its source is, below `diffveil_kernels.jit`.
        function: The source's name.
        parameters: Names and Triton types, such as ``*fp32`` or ``i32``.
        constants: Compile-time constants.
        num_warps: Warps of a program; 32 threads each.
    """

    name: str
    module: str
    function: str
    parameters: tuple[tuple[str, str], ...]
    constants: Mapping[str, int | bool] = field(default_factory=dict)
    num_warps: int = 4


def _typed(**types: str) -> tuple[tuple[str, str], ...]:
    return tuple(types.items())


_STEP_TENSORS = (
    *("latent", "previous", "epsilon", "previous_epsilon"),
    *("noise", "gradient", "background", "mask"),
)

_ALL = (
    KernelSpec(
        "keyed_normal",
        "keyed_normal",
        "keyed_normal",
        _typed(keys="*i32", out="*fp32", count="i32"),
        {"BLOCKS": 64},
        num_warps=2,
    ),
    KernelSpec(
        "sum_of_squares",
        "linear_step",
        "sum_of_squares",
        _typed(gradient="*fp32", coefficients="*fp64", pushed="*fp32", sums="*fp64", count="i32"),
        {"PARTS": PARTS, "BLOCK": 512},
    ),
    KernelSpec(
        "linear_step",
        "linear_step",
        "linear_step",
        (
            *((name, "*fp32") for name in _STEP_TENSORS),
            ("coefficients", "*fp64"),
            *((name, "*fp32") for name in ("pushed", "normalise", "blend")),
            *_typed(sums="*fp64", out="*fp32", count="i32", plane="i32"),
        ),
        {"PARTS": PARTS, "BLOCK": 512},
    ),
)

SPECS: Mapping[str, KernelSpec] = {spec.name: spec for spec in _ALL}
