"""What the parts of a recovery key may be, whether it was made here or read from a file.

Each check returns its problems as text, so that a caller can report all of them at once. The text
gives names, shapes and limits, never values: the values are a face.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "MAX_COORDINATE",
    "MAX_FACES",
    "check_array",
    "check_codes",
    "check_geometry",
    "compact",
    "compact_noise",
    "to_codes",
    "to_float64",
]

MAX_FACES = 1024
MAX_COORDINATE = 1e7  # pixels
_MAX_NOISE_SIZE = 2.0  # root mean square; measured at 0.7 to 1.4 after inversions that work
_MIN_SCALE, _MAX_SCALE = 1e-4, 1e4  # crop pixels a photo pixel
_MAX_WIDTH, _MAX_LENGTH, _MAX_CHANNELS, _MAX_LATENT_SIDE = 4096, 512, 64, 512


def compact(codes: npt.NDArray[np.float32]) -> npt.NDArray[np.floating]:
    """Codes in float16, or as they are where one is too large for it."""
    if np.abs(codes).max(initial=0) > np.finfo(np.float16).max:
        return codes
    return codes.astype(np.float16)


def compact_noise(latents: npt.NDArray[np.float32]) -> npt.NDArray[np.floating]:
    """Noise maps [N, K, C, s, s] of one photo in float16 where recovery does not feel it.

    An inversion that works ends in noise of about unit size, and forgives its rounding (ADR 17
    has figures). One that has run away amplifies it on the way back: then all stay as they are.
    """
    sizes = np.sqrt(np.mean(np.square(latents, dtype=np.float64), axis=(2, 3, 4)))
    return compact(latents) if sizes.max(initial=0) <= _MAX_NOISE_SIZE else latents


def to_codes(value: object) -> npt.NDArray[np.floating] | None:
    """Copy a float16 or float32 array; None for all else: to round codes would be silent loss."""
    if not isinstance(value, np.ndarray) or value.dtype not in (np.float16, np.float32):
        return None
    return np.array(value, order="C")


def to_float64(value: object) -> npt.NDArray[np.float64] | None:
    """Copy to float64; None where that is impossible (NumPy's own error would quote the value)."""
    try:
        return np.array(value, dtype=np.float64, order="C")
    except (TypeError, ValueError):
        return None


def check_array(
    name: str, array: npt.NDArray[np.floating] | None, shape: tuple[int | None, ...]
) -> list[str]:
    """Check type, shape and finiteness; None in `shape` is any size but zero."""
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    if array is None:
        return [f"{name} must be a floating-point array {wanted}"]
    if array.ndim != len(shape) or any(
        size == 0 or (want is not None and size != want)
        for size, want in zip(array.shape, shape, strict=True)
    ):
        return [f"{name} must be {wanted}, not {list(array.shape)}"]
    return [] if np.isfinite(array).all() else [f"{name} must be finite"]


def check_codes(tokens: tuple[int, ...], latents: tuple[int, ...]) -> list[str]:
    """Check the sizes of tokens [10, D] or [10, T, W] and latents [K, C, s, s]."""
    problems = []
    if tokens[-1] > _MAX_WIDTH:
        problems.append(f"tokens must be at most {_MAX_WIDTH} wide, not {tokens[-1]}")
    if len(tokens) == 3 and tokens[1] > _MAX_LENGTH:
        problems.append(f"conditionings must be at most {_MAX_LENGTH} long, not {tokens[1]}")
    count, channels, height, width = latents
    if count > 2 or channels > _MAX_CHANNELS or height != width or width > _MAX_LATENT_SIDE:
        problems.append(
            f"latents must be [1 or 2, C ≤ {_MAX_CHANNELS}, s, s ≤ {_MAX_LATENT_SIDE}], "
            f"not {list(latents)}"
        )
    return problems


def check_geometry(
    matrix: npt.NDArray[np.float64],
    box: npt.NDArray[np.float64],
    landmarks: npt.NDArray[np.float64],
) -> list[str]:
    """Check that a face can be pasted back in bounded time: coordinates and scale in range.

    Args:
        matrix: [2, 3], photo pixels to crop pixels.
        box: [4], x0, y0, x1, y1 in photo pixels.
        landmarks: [5, 2], (x, y) in photo pixels.
    """
    if any(np.abs(array).max() > MAX_COORDINATE for array in (matrix, box, landmarks)):
        return [f"matrix, box and landmarks must stay within ±{MAX_COORDINATE:g}"]
    problems = []
    if not (box[0] < box[2] and box[1] < box[3]):
        problems.append("box must have x0 < x1 and y0 < y1")
    # Both singular values, not the determinant: a map may stretch one way and flatten the other.
    largest, smallest = np.linalg.svd(matrix[:, :2], compute_uv=False)
    if smallest < _MIN_SCALE or largest > _MAX_SCALE:
        problems.append(f"matrix must scale by {_MIN_SCALE:g} to {_MAX_SCALE:g}")
    return problems
