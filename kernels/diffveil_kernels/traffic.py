"""Bytes that an operation must move: each input read once, each output written once.

Scratch memory counts both ways. Divided by the memory's bandwidth this is the time that no kernel
can beat, unless its data already lies in a cache.
"""

from __future__ import annotations

from diffveil_kernels.geometry import FaceTable, Integer
from diffveil_kernels.specs import PARTS

__all__ = ["face_crop_bytes", "face_paste_bytes", "keyed_normal_bytes", "linear_step_bytes"]


def keyed_normal_bytes(rows: int, count: int) -> int:
    """Keys in, float32 out."""
    return rows * (32 + 4 * count)


def linear_step_bytes(
    rows: int, channels: int, plane: int, *, terms: int, guided: bool, normalised: bool, blend: bool
) -> int:
    """float32 tensors in, one out.

    Args:
        rows: Latents.
        channels: Channels of each.
        plane: Numbers of a channel.
        terms: Tensors with a coefficient beside the latent and the gradient.
        guided: Whether a gradient is subtracted.
        normalised: Whether it is normalised, which reads it once more.
        blend: Whether a background is blended in.
    """
    reads = 1 + terms + guided + (guided and normalised) + blend
    per_row = 4 * channels * plane * (reads + 1) + 4 * plane * blend
    per_row += 8 * 6 + 4 * 3 + 8 * PARTS * 2 * (guided and normalised)
    return rows * per_row


def face_crop_bytes(table: FaceTable, bytes_per_number: int) -> int:
    """Regions of the photos in, crops out; regions in 8 bits, those beyond a photo not at all."""
    total = 0
    for row in table.integers.tolist():
        width = min(row[Integer.X0] + row[Integer.REGION_WIDTH], row[Integer.WIDTH])
        height = min(row[Integer.Y0] + row[Integer.REGION_HEIGHT], row[Integer.HEIGHT])
        width, height = width - max(row[Integer.X0], 0), height - max(row[Integer.Y0], 0)
        total += 3 * max(width, 1) * max(height, 1)
    return total + _reduced_bytes(table) + len(table) * 3 * table.size**2 * bytes_per_number


def face_paste_bytes(table: FaceTable, bytes_per_number: int) -> int:
    """Crops and mask in; around each face, the photo in and out."""
    boxes = table.integers[:, Integer.LEFT : Integer.BOTTOM + 1]
    pixels = int(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum())
    crops = len(table) * 3 * table.size**2 * bytes_per_number + 4 * table.size**2
    return crops + _reduced_bytes(table) + 6 * pixels


def _reduced_bytes(table: FaceTable) -> int:
    areas = table.integers[:, Integer.REDUCED_WIDTH] * table.integers[:, Integer.REDUCED_HEIGHT]
    return 2 * 3 * int(areas.sum())
