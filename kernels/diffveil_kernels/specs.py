"""What is compiled: every kernel's parameters, constants and warps, in one table.

The parameters are the kernel's own in order. A compiled kernel takes the hidden ones of its Triton
version after them; its record says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FLOATS", "PARTS", "SPECS", "TARGETS", "KernelSpec"]

TARGETS = (80, 86, 87, 89, 90, 100, 120)
"""Compute capabilities that kernels are compiled for: 8.0 … 12.0."""

FLOATS = ("fp16", "fp32")
"""Types that crops come in."""

_FACE_BLOCK = 128  # pixels of a program of the face kernels

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

_FACE_TABLES = {"integers": "*i64", "numbers": "*fp64"}
_SIZES = {"capacity": "i32", "size": "i32"}

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
    *(
        KernelSpec(
            f"face_reduce_{kind}",
            "faces",
            "face_reduce",
            _typed(source=f"*{kind}", **_FACE_TABLES, reduced="*u8", capacity="i32"),
            {"FLOATING": kind != "u8", "BLOCK": _FACE_BLOCK},
        )
        for kind in ("u8", *FLOATS)
    ),
    *(
        KernelSpec(
            f"face_crop_{kind}",
            "faces",
            "face_crop",
            _typed(reduced="*u8", **_FACE_TABLES, out=f"*{kind}", **_SIZES),
            {"BLOCK": _FACE_BLOCK},
        )
        for kind in FLOATS
    ),
    KernelSpec(
        "face_paste",
        "faces",
        "face_paste",
        _typed(photos="*u8", reduced="*u8", mask="*fp32", **_FACE_TABLES, **_SIZES),
        {"BLOCK": _FACE_BLOCK},
    ),
)

SPECS: dict[str, KernelSpec] = {spec.name: spec for spec in _ALL}
