"""Which kernels an operation launches, over which grid, with which arguments.

Nothing is launched here: `diffveil_kernels.jit.ops` runs calls on PyTorch tensors by Triton, and
`diffveil_kernels.launch` runs them on device pointers by compiled kernels. Buffers are whatever the
one that launches takes; they are contiguous, and not looked into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffveil_kernels.errors import KernelInputError
from diffveil_kernels.geometry import FaceTable
from diffveil_kernels.specs import FLOATS, PARTS, SPECS

__all__ = [
    "Buffer",
    "Call",
    "StepBuffers",
    "face_crop_calls",
    "face_paste_calls",
    "keyed_normal_calls",
    "linear_step_calls",
]

Buffer = Any
"""A tensor for Triton, or an address of device memory."""

_MAX_COUNT = 2**31 - 2**16  # indices of a row are int32, and a program's may pass the row's end
_MAX_GRID = 2**16 - 1  # of the second axis and the third; the first takes 2**31 - 1


@dataclass(frozen=True)
class Call:
    """One launch.

    Attributes:
        kernel: Its name in `SPECS`.
        grid: Programs along x, y, z.
        arguments: In the order of the spec's parameters.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Buffer | int, ...]


@dataclass(frozen=True)
class StepBuffers:
    """Tensors of `linear_step`, as `diffveil_kernels.reference.linear_step` describes them.

    A tensor that no row uses may be any buffer, for example `latent` again. `out` may be one of
    those that are read element by element, but not `mask`.
    """

    latent: Buffer
    previous: Buffer
    epsilon: Buffer
    previous_epsilon: Buffer
    noise: Buffer
    gradient: Buffer
    background: Buffer
    mask: Buffer
    coefficients: Buffer
    pushed: Buffer
    normalise: Buffer
    blend: Buffer


def keyed_normal_calls(keys: Buffer, out: Buffer, rows: int, count: int) -> tuple[Call, ...]:
    """Unit Gaussians of `rows` keys.

    Args:
        keys: int32 [rows, 8].
        out: float32 [rows, count].
        rows: Keys.
        count: Numbers for each.

    Raises:
        KernelInputError: There are too many for one launch.
    """
    per_program = 16 * int(SPECS["keyed_normal"].constants["BLOCKS"])
    grid = _grid(rows, count, per_program)
    return (Call("keyed_normal", grid, (keys, out, count)),) if rows and count else ()


def linear_step_calls(
    tensors: StepBuffers,
    sums: Buffer,
    out: Buffer,
    *,
    rows: int,
    channels: int,
    plane: int,
    normalised: bool = True,
) -> tuple[Call, ...]:
    """One step of a sampler table for `rows` latents.

    Args:
        tensors: What is read.
        sums: float64 [rows, PARTS], scratch.
        out: float32 [rows, channels * plane].
        rows: Latents.
        channels: Channels of each.
        plane: Numbers of a channel, height times width.
        normalised: Whether any row's gradient is normalised; if none is, `sums` is not used.

    Raises:
        KernelInputError: There are too many for one launch.
    """
    count = channels * plane
    spec = SPECS["linear_step"]
    grid = _grid(rows, count, int(spec.constants["BLOCK"]))
    if not rows or not count:
        return ()
    t = tensors
    squares = Call(
        "sum_of_squares",
        (rows, PARTS, 1),
        (t.gradient, t.coefficients, t.pushed, sums, count),
    )
    values = tuple(getattr(t, name) for name in StepBuffers.__dataclass_fields__)
    step = Call("linear_step", grid, (*values, sums, out, count, plane))
    return (squares, step) if normalised else (step,)


def face_crop_calls(
    photos: Buffer,
    integers: Buffer,
    numbers: Buffer,
    reduced: Buffer,
    out: Buffer,
    table: FaceTable,
    kind: str,
) -> tuple[Call, ...]:
    """Aligned crops of all faces of a table.

    Args:
        photos: uint8 [table.elements].
        integers: The table's, int64.
        numbers: The table's, float64.
        reduced: uint8 [N, 3, table.capacity], scratch.
        out: [N, 3, S, S].
        table: From `diffveil_kernels.geometry.crop_table`.
        kind: Of `out`: ``"fp16"`` or ``"fp32"``.

    Raises:
        KernelInputError: There are too many faces for one launch, or there is no such type.
    """
    sizes = (table.capacity, table.size)
    kernel = _of_kind("face_crop", kind)
    crop = Call(
        kernel,
        _tiles(table, table.size**2, kernel),
        (reduced, integers, numbers, out, *sizes),
    )
    reduce = Call(
        "face_reduce_u8",
        _tiles(table, table.capacity, "face_reduce_u8"),
        (photos, integers, numbers, reduced, table.capacity),
    )
    return (reduce, crop) if len(table) else ()


def face_paste_calls(
    photos: Buffer,
    crops: Buffer,
    mask: Buffer,
    integers: Buffer,
    numbers: Buffer,
    reduced: Buffer,
    table: FaceTable,
    kind: str,
) -> tuple[Call, ...]:
    """All faces of a table, blended into their photos in place.

    Args:
        photos: uint8 [table.elements]; changed.
        crops: [N, 3, S, S].
        mask: float32 [S, S], that of the table.
        integers: The table's, int64.
        numbers: The table's, float64.
        reduced: uint8 [N, 3, table.capacity], scratch.
        table: From `diffveil_kernels.geometry.paste_table`.
        kind: Of `crops`: ``"fp16"`` or ``"fp32"``.

    Raises:
        KernelInputError: There are too many faces for one launch, or there is no such type.
    """
    kernel = _of_kind("face_reduce", kind)
    reduce = Call(
        kernel,
        _tiles(table, table.capacity, kernel),
        (crops, integers, numbers, reduced, table.capacity),
    )
    paste = Call(
        "face_paste",
        _tiles(table, table.box, "face_paste"),
        (photos, reduced, mask, integers, numbers, table.capacity, table.size),
    )
    return (reduce, paste) if len(table) and table.box else ()


def _of_kind(kernel: str, kind: str) -> str:
    if kind not in FLOATS:
        raise KernelInputError(f"crops: no kernel for {kind}, expected one of {', '.join(FLOATS)}")
    return f"{kernel}_{kind}"


def _tiles(table: FaceTable, pixels: int, kernel: str) -> tuple[int, int, int]:
    """Programs for that many pixels of every face; a face that has fewer leaves some idle."""
    if len(table) > _MAX_GRID or pixels > _MAX_COUNT:
        raise KernelInputError(
            f"{len(table)} faces of {pixels} pixels are too many for one launch: at most "
            f"{_MAX_GRID} of {_MAX_COUNT}; split them up"
        )
    return (-(-pixels // int(SPECS[kernel].constants["BLOCK"])), len(table), 1)


def _grid(rows: int, count: int, per_program: int) -> tuple[int, int, int]:
    """Programs for `count` elements of each row."""
    columns = -(-count // per_program)
    if not (0 <= rows < 2**31 and 0 <= count <= _MAX_COUNT and columns <= _MAX_GRID):
        raise KernelInputError(
            f"{rows} rows of {count} elements are too many for one launch: at most "
            f"{min(_MAX_COUNT, _MAX_GRID * per_program)} elements a row; split them up"
        )
    return (rows, columns, 1)
