"""Which part of an aligned crop replaces the photo, and how it fades out."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffveil.errors import OptionError

__all__ = [
    "cell_mask",
    "face_mask",
    "fitted_mask",
    "gaussian",
    "latent_mask",
    "recovery_mask",
    "smoothed_over",
    "turn",
]

Array: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.float32]

_ROUND = 2.5  # exponent of the superellipse: fuller than an ellipse, to cover the brows' ends
# A head seen from above, in distances between its eyes: half its width, half its depth, and how far
# the eyes lie before its middle, the nose's tip before the eyes: round figures that fit photos.
_HALF_WIDTH, _HALF_DEPTH, _EYES, _NOSE = 1.2, 1.5, 1.3, 0.5
_FAR = 0.55  # least share of a half's width that a turn leaves: the far eye is at 0.45 of it
_TURN = 1.0  # of the nose beside the eyes' middle, in eye distances: beyond it is a profile


def face_mask(size: int, template: ArrayLike) -> Mask:
    """Where a face may be, however the head is turned: an ellipse from the brows to the chin.

    It is 1 over brows, eyes, nose, cheeks, mouth and chin, and falls smoothly to 0 before the
    crop's border.

    Args:
        size: Side of the crop in pixels.
        template: [5, 2], the landmarks in the crop.

    Returns:
        float32 [size, size], 0 … 1.
    """
    centre, full, end = _ellipses(size, template)
    return _feathered(size, centre, full, end)


def fitted_mask(size: int, template: ArrayLike, landmarks: ArrayLike) -> Mask:
    """Where one protected face replaces the photo: `face_mask` without what lies beside the head.

    Where a head is turned, the half beyond its nose ends near the far eye, at the far cheek, and
    what the crop shows outside is background. How far it is turned is read off the nose's place
    between the eyes.

    Args:
        size: Side of the crop in pixels.
        template: [5, 2], where the landmarks lie on average in the crop.
        landmarks: [5, 2], where they lie in this one.

    Returns:
        float32 [size, size], 0 … 1; nowhere more than `face_mask`.

    Raises:
        OptionError: The landmarks are not five finite points.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise OptionError(f"landmarks: received {list(points.shape)}, expected finite [5, 2]")
    centre, full, end = _ellipses(size, template)
    aside = turn(points) - turn(np.asarray(template, dtype=np.float64))
    far, left = int(aside > 0), _far_share(aside)
    rim = (end - full)[far, 0]
    full[far, 0] *= left
    end[far, 0] = full[far, 0] + left * rim
    return _feathered(size, centre, full, end)


def recovery_mask(size: int, template: ArrayLike) -> Mask:
    """Where a recovered face replaces the photo: all of `face_mask` at full strength, and a rim.

    It is 1 wherever `face_mask` is above zero and one pixel beyond, so that nothing of the
    protected face remains after recovery.

    Args:
        size: Side of the crop in pixels.
        template: [5, 2], the landmarks in the crop.

    Returns:
        float32 [size, size], 0 … 1.
    """
    centre, _, end = _ellipses(size, template)
    rim = 2.0  # one pixel of bilinear sampling in both directions, and some
    full = end + rim
    limit = np.array([[*centre], [*(size - 1 - centre)]])
    feathered = _feathered(
        size, centre, full, np.maximum(np.minimum(full + 0.06 * size, limit), full + 0.5)
    )
    feathered[[0, -1], :] = 0.0
    feathered[:, [0, -1]] = 0.0
    return feathered


def latent_mask(mask: Mask, size: int) -> Mask:
    """A mask at the latent's resolution: the mean over the pixels that a latent cell covers.

    Args:
        mask: float32 [S, S], 0 … 1, of the crop.
        size: Side of the latent, s.

    Returns:
        float32 [s, s], 0 … 1.

    Raises:
        OptionError: S is no multiple of s.
    """
    if size < 1 or mask.shape[0] % size or mask.shape[1] % size:
        raise OptionError(f"mask: {list(mask.shape)} does not divide into {size}x{size} cells")
    cells = mask.reshape(size, mask.shape[0] // size, size, mask.shape[1] // size)
    return np.asarray(cells.mean(axis=(1, 3), dtype=np.float64), dtype=np.float32)


def cell_mask(cells: NDArray[np.bool_], size: int) -> Mask:
    """1 over the pixels of some latent cells, falling to 0 within the better part of a cell.

    Args:
        cells: The cells, bool [s, s]; none at the border.
        size: Side S of the crop in pixels, a multiple of s.

    Returns:
        float32 [S, S], 0 … 1; exactly 0 along its border.
    """
    side = size // cells.shape[0]
    pixels = np.kron(cells, np.ones((side, side))) > 0
    grown = np.clip(gaussian(pixels.astype(np.float64), 0.35 * side) * 4.0, 0.0, 1.0)
    mask = np.maximum(grown * grown * (3.0 - 2.0 * grown), pixels)
    mask[mask < 0.02] = 0.0
    mask[[0, -1], :] = 0.0
    mask[:, [0, -1]] = 0.0
    return np.asarray(mask, dtype=np.float32)


def smoothed_over(crops: Mask, mask: Mask) -> Mask:
    """Crops without what a mask covers: there, its surroundings smoothly continued.

    Normalised convolution (Knutsson and Westin, CVPR 1993), with ever wider Gaussians where the
    nearer ones see nothing.

    Args:
        crops: float32 [N, 3, S, S].
        mask: float32 [S, S]; every pixel above zero is replaced.

    Returns:
        float32 [N, 3, S, S]; it does not depend on the replaced pixels.
    """
    known = (mask <= 0.0).astype(np.float64)
    total = np.zeros(crops.shape, dtype=np.float64)
    weight = np.zeros(mask.shape, dtype=np.float64)
    for share, sigma in ((1.0, 1 / 32), (1e-3, 1 / 8), (1e-9, 1 / 2)):
        width = sigma * mask.shape[0]
        total += share * gaussian(crops * known, width)
        weight += share * gaussian(known, width)
    return np.where(known > 0.0, crops, total / weight).astype(np.float32)


def gaussian(images: Array, sigma: float) -> Array:
    """Images […, S, S] smoothed by a Gaussian of unit sum, dark beyond their borders."""
    position = np.arange(images.shape[-1])
    kernel = np.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
    kernel /= sigma * np.sqrt(2.0 * np.pi)
    return np.asarray(kernel @ images @ kernel)


def turn(landmarks: Array) -> float:
    """How far a head is turned, as its nose tells it.

    Args:
        landmarks: float64 [5, 2].

    Returns:
        The nose beside the middle of the eyes, in eye distances; positive to the right. NaN where
        the landmarks are.
    """
    eyes = landmarks[1] - landmarks[0]
    beside = float((landmarks[2] - landmarks[:2].mean(axis=0)) @ eyes)
    return beside / max(float(eyes @ eyes), 1e-12)


def _ellipses(size: int, template: ArrayLike) -> tuple[Array, Array, Array]:
    """Centre [2] and the semi-axes [[left, top], [right, bottom]] where `face_mask` is 1 and 0."""
    points = np.asarray(template, dtype=np.float64)
    eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
    between, drop = float(points[1, 0] - points[0, 0]), float(mouth[1] - eyes[1])
    # Measured from the template's own features: brows about 0.45 of the eye-mouth distance above
    # the eyes, the chin 0.6 of it below the mouth, cheeks 1.2 eye distances from the middle.
    centre = np.array([(eyes[0] + mouth[0]) / 2.0, eyes[1] + 0.45 * drop])
    full = np.array([[1.12 * between, 0.98 * drop], [1.12 * between, 1.12 * drop]])
    # The recovery mask needs room for its own feather outside this one.
    room = np.array([[*centre], [*(size - 1 - centre)]]) - (2.0 + 0.03 * size)
    end = np.minimum(full + 0.13 * size, room)
    return centre, np.minimum(full, 0.94 * end), end


def _far_share(turn: float) -> float:
    """How much of its width the half beyond the nose keeps when a head turns: 1 … `_FAR`.

    The outline of an ellipse (the head from above) beside a point before its middle (the eyes),
    both turned by the angle at which the nose's tip appears where it does.
    """
    angle = np.arctan(min(abs(turn), _TURN) / _NOSE)
    outline = np.hypot(_HALF_WIDTH * np.cos(angle), _HALF_DEPTH * np.sin(angle))
    share = (outline - _EYES * np.sin(angle)) / (_HALF_WIDTH * np.cos(angle))
    return float(np.clip(share, _FAR, 1.0))


def _feathered(size: int, centre: Array, full: Array, end: Array) -> Mask:
    """1 inside the half-ellipses `full`, 0 outside `end`, and a smooth step between them."""
    offset = np.arange(size) - centre[:, None]  # [2, S]: across, along
    side = (offset >= 0).astype(int)  # 0 left of or above the centre, else 1

    def radius(axes: Array) -> Array:
        across, along = (np.abs(offset[i] / axes[side[i], i]) ** _ROUND for i in (0, 1))
        return np.asarray((across + along[:, None]) ** (1.0 / _ROUND))

    past_full, before_end = np.maximum(radius(full) - 1, 0), np.maximum(1 - radius(end), 0)
    # Between the ellipses both are positive; `full` lies within `end`, so never both zero.
    step = before_end / (past_full + before_end)
    return np.asarray(step * step * (3 - 2 * step), dtype=np.float32)
