"""Faces out of a photo and back in: similarity alignment, warping, blending.

All coordinates are pixels with the centre of the first pixel at (0, 0), in photo and crop alike. A
face's `matrix` is float64 [2, 3] and maps photo to crop: (u, v) = matrix · (x, y, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from diffveil.errors import OptionError
from diffveil.masks import face_mask, latent_mask, recovery_mask

__all__ = [
    "ARCFACE_TEMPLATE",
    "crop_face",
    "face_mask",
    "in_crop",
    "latent_mask",
    "paste_face",
    "paste_faces",
    "recovery_mask",
    "similarity",
    "template_for",
]

Matrix: TypeAlias = NDArray[np.float64]
Pixels: TypeAlias = NDArray[np.uint8]
Mask: TypeAlias = NDArray[np.float32]

ARCFACE_TEMPLATE: tuple[tuple[float, float], ...] = (
    (38.29, 51.70),
    (73.53, 51.50),
    (56.03, 71.74),
    (41.55, 92.37),
    (70.73, 92.20),
)
"""Where the five landmarks lie in ArcFace's 112×112 crop (Deng et al., arXiv 1801.07698)."""

_MAX_REACH = 8.0  # a crop may reach this many times the photo's longer side, no further
_MATCH_LIMIT = 16.0  # largest colour correction, levels of 255
_OWNER_SHARPNESS = 24.0  # of the border between overlapping faces, in mask radii
_BAND_PIXELS = 2**19  # blended at a time: a face that fills a photo takes no more memory than this


def template_for(size: int) -> Matrix:
    """ArcFace's landmarks in a crop of another size, with a margin of 1/16 on every side.

    Args:
        size: Side of the crop in pixels; for 128 the template is ArcFace's shifted by (8, 8).

    Returns:
        float64 [5, 2], (x, y) in crop pixels.
    """
    # Scaled about pixel corners, so that every size shows the same part of the face.
    arcface = np.asarray(ARCFACE_TEMPLATE, dtype=np.float64)
    return (arcface + 8.0 + 0.5) * (size / 128.0) - 0.5


def similarity(landmarks: ArrayLike, template: ArrayLike) -> Matrix:
    """Rotation, uniform scale and shift that carry landmarks closest to a template.

    Least squares without reflection (Umeyama, IEEE TPAMI 13(4), 1991, equations 38 to 43).

    Args:
        landmarks: [N, 2], (x, y) in photo pixels, N ≥ 2.
        template: [N, 2], (x, y) in crop pixels.

    Returns:
        float64 [2, 3], photo to crop.

    Raises:
        OptionError: Shapes differ, a number is not finite, or the points coincide.
    """
    source = np.asarray(landmarks, dtype=np.float64)
    target = np.asarray(template, dtype=np.float64)
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 2 or len(source) < 2:
        raise OptionError(
            f"landmarks: received {list(source.shape)}, expected {list(target.shape)}"
        )
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise OptionError("landmarks: a coordinate is not a finite number")
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    variance = float(((source - source_mean) ** 2).sum(axis=1).mean())
    if variance < 1e-4:
        raise OptionError("landmarks: all points coincide, so that no face can be aligned")
    covariance = (target - target_mean).T @ (source - source_mean) / len(source)
    u, singular, vt = np.linalg.svd(covariance)
    signs = np.array([1.0, math.copysign(1.0, float(np.linalg.det(u) * np.linalg.det(vt)))])
    rotation = (u * signs) @ vt
    scale = float(singular @ signs) / variance
    if not scale > 1e-9:
        raise OptionError("landmarks: no rotation and scale carry them to the template")
    matrix = np.empty((2, 3), dtype=np.float64)
    matrix[:, :2] = scale * rotation
    matrix[:, 2] = target_mean - matrix[:, :2] @ source_mean
    return matrix


def in_crop(points: Matrix, matrix: Matrix) -> Matrix:
    """Where points of a photo lie in a crop: float64 [N, 2] through photo to crop, [2, 3]."""
    return np.asarray(points @ matrix[:, :2].T + matrix[:, 2])


def crop_face(pixels: Pixels, matrix: Matrix, size: int) -> Pixels:
    """Cut an aligned face out of a photo.

    Antialiased where the crop is smaller than the face, bicubic otherwise; beyond the photo's
    border the border pixels repeat.

    Args:
        pixels: Photo, uint8 [H, W, 3].
        matrix: float64 [2, 3], photo to crop.
        size: Side of the crop in pixels.

    Returns:
        uint8 [size, size, 3].

    Raises:
        OptionError: The face lies so far outside that it cannot belong to this photo.
    """
    height, width = pixels.shape[:2]
    inverse = _inverse(matrix)
    x0, y0, x1, y1 = _bounds(inverse, size, margin=4)
    reach = _MAX_REACH * max(width, height) + 64
    if max(-x0, -y0, x1 - width, y1 - height) > reach:
        raise OptionError("face: its landmarks lie far outside the photo")
    if x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height:
        region = pixels[y0:y1, x0:x1]
    else:
        rows = np.clip(np.arange(y0, y1), 0, height - 1)
        columns = np.clip(np.arange(x0, x1), 0, width - 1)
        region = pixels[rows[:, None], columns]
    shifted = inverse.copy()
    shifted[:, 2] -= (x0, y0)
    return _levels(_warp(Image.fromarray(region), shifted, (size, size)))


def paste_face(
    pixels: Pixels, crop: Pixels, matrix: Matrix, mask: Mask, *, match_colour: bool = True
) -> Pixels:
    """Put one face back; see `paste_faces`."""
    return paste_faces(pixels, [crop], [matrix], mask, match_colour=match_colour)


def paste_faces(
    pixels: Pixels,
    crops: Sequence[Pixels],
    matrices: Sequence[Matrix],
    mask: Mask,
    *,
    match_colour: bool = True,
) -> Pixels:
    """Put faces back into the photo that they were cut from.

    A pixel changes only where a face's mask is above zero. Where faces overlap, every pixel
    belongs to the face whose centre is nearer, measured in that face's own size: otherwise one
    face's crop would show the unprotected edge of its neighbour. The order of the faces does not
    matter.

    Args:
        pixels: Photo, uint8 [H, W, 3]. It is not modified.
        crops: Faces, each uint8 [S, S, 3].
        matrices: float64 [2, 3] each, photo to crop.
        mask: float32 [S, S], 0 … 1, the same for all faces, or [F, S, S]; 0 along its border.
        match_colour: Shift the crops' slowly varying colour towards the photo's along the edge of
            the mask, by at most 16 levels, so that no seam shows.

    Returns:
        uint8 [H, W, 3].

    Raises:
        OptionError: Shapes do not fit together.
    """
    _check_pastes(pixels, crops, matrices, mask)
    height, width = pixels.shape[:2]
    boxes = [_bounds(_inverse(matrix), mask.shape[-1], margin=1) for matrix in matrices]
    masks = list(mask) if mask.ndim == 3 else [mask] * len(crops)
    faces = [
        (
            Image.fromarray(_matched(pixels, crop, matrix, own) if match_colour else crop),
            matrix,
            own,
        )
        for crop, matrix, own in zip(crops, matrices, masks, strict=True)
    ]
    result: Pixels = pixels.copy()
    for x0, y0, x1, y1 in boxes:
        box = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
        if box[0] >= box[2] or box[1] >= box[3]:
            continue
        overlapping = [
            face
            for face, other in zip(faces, boxes, strict=True)
            if other[0] < x1 and other[2] > x0 and other[1] < y1 and other[3] > y0
        ]
        # Where regions of two faces overlap, both passes compute the same values.
        rows = max(1, _BAND_PIXELS // (box[2] - box[0]))
        for top in range(box[1], box[3], rows):
            region = np.s_[top : min(top + rows, box[3]), box[0] : box[2]]
            result[region] = _composite(pixels[region], (box[0], top), overlapping)
    return result


def _composite(
    photo: Pixels,
    origin: tuple[int, int],
    faces: Sequence[tuple[Image.Image, Matrix, Mask]],
) -> Pixels:
    """Blend faces into one region of the photo.

    Args:
        photo: The region, uint8 [h, w, 3].
        origin: Its first pixel (x, y) in the photo.
        faces: Crops with their matrices, photo to crop, and masks, float32 [S, S].

    Returns:
        uint8 [h, w, 3].
    """
    height, width = photo.shape[:2]
    placed, masks, warps = [], [], []
    for crop, matrix, mask in faces:
        local = matrix.copy()
        local[:, 2] += matrix[:, :2] @ np.asarray(origin, dtype=np.float64)
        # The mask is smooth and is sampled pointwise: an antialiased one would grow beyond
        # what `recovery_mask` covers when the face is small.
        weight = _sample(Image.fromarray(mask), local, (width, height), Image.Resampling.BILINEAR)
        placed.append(local)
        masks.append(np.clip(weight, 0.0, 1.0))
        warps.append(_warp(crop, local, (width, height)))
    if len(faces) == 1:  # all of it is this face's
        base = photo.astype(np.float32)
        return _levels(base + masks[0][..., None] * (warps[0] - base))
    y, x = np.mgrid[0:height, 0:width]
    radii = []
    for local, (_, _, mask) in zip(placed, faces, strict=True):
        offset = [
            (row[0] * x + row[1] * y + row[2] - m) / e
            for row, m, e in zip(local, *_support(mask), strict=True)
        ]
        radii.append(np.hypot(*offset))
    cover = np.maximum.reduce(masks)
    nearest = np.minimum.reduce(radii)
    shares = [
        m * np.exp(_OWNER_SHARPNESS * (nearest - r)) for m, r in zip(masks, radii, strict=True)
    ]
    total = np.maximum(np.add.reduce(shares), np.finfo(np.float32).tiny)
    change = np.zeros(photo.shape, dtype=np.float64)
    for share, warp in zip(shares, warps, strict=True):
        change += (cover * share / total)[..., None] * (warp - photo)
    return _levels(photo + change)


def _matched(pixels: Pixels, crop: Pixels, matrix: Matrix, mask: Mask) -> Pixels:
    """A crop whose slowly varying colour meets the photo's along the edge of the mask.

    The difference to the photo is measured where the mask is between 0 and 1 and spread inwards by
    normalised convolution (Knutsson and Westin, CVPR 1993) with a wide Gaussian.
    """
    size = mask.shape[0]
    rim = mask * (1.0 - mask)
    positions = np.arange(size)
    gaussian = np.exp(-0.5 * ((positions[:, None] - positions[None]) / (size / 8.0)) ** 2)
    difference = crop_face(pixels, matrix, size).astype(np.float64) - crop
    # Where they differ much, hair or a hand lies in one of them: that says nothing about light.
    trust = rim / (1.0 + (np.abs(difference).mean(axis=-1) / _MATCH_LIMIT) ** 2)
    weight = gaussian @ (trust + 0.05 * rim) @ gaussian
    spread = np.stack(
        [gaussian @ (trust * difference[..., channel]) @ gaussian for channel in range(3)], axis=-1
    )
    correction = spread / np.maximum(weight, 1e-6)[..., None]
    correction = _MATCH_LIMIT * np.tanh(correction / _MATCH_LIMIT)
    return _levels(crop + correction)


def _warp(image: Image.Image, matrix: Matrix, size: tuple[int, int]) -> NDArray[np.float32]:
    """Sample an image through an affine map from output to input, without aliasing.

    Args:
        image: RGB.
        matrix: float64 [2, 3], output pixel to input pixel.
        size: Width w and height h of the output.

    Returns:
        float32 [h, w, 3], about 0 … 255: bicubic interpolation may overshoot.
    """
    shrink = math.sqrt(abs(float(np.linalg.det(matrix[:, :2]))))  # input pixels an output pixel
    if shrink > 1.0:
        # Filter first, at the output's resolution, then rotate and shift.
        reduced = tuple(max(1, round(side / shrink)) for side in image.size)
        factor = np.array([reduced[0] / image.width, reduced[1] / image.height])
        image = image.resize((reduced[0], reduced[1]), Image.Resampling.BICUBIC, reducing_gap=3.0)
        matrix = matrix * factor[:, None]
        matrix[:, 2] += 0.5 * factor - 0.5  # pixel centres: x' + ½ = factor · (x + ½)
    # In floating point: Pillow's 8-bit transform truncates, which darkens by half a level.
    channels = [
        _sample(channel.convert("F"), matrix, size, Image.Resampling.BICUBIC)
        for channel in image.split()
    ]
    return np.stack(channels, axis=-1)


def _sample(
    image: Image.Image, matrix: Matrix, size: tuple[int, int], resampling: Image.Resampling
) -> NDArray[np.float32]:
    """Pointwise interpolation of a mode F image, [h, w]; zero outside the image."""
    # Pillow counts from pixel corners: x + ½ in and out.
    corner = matrix.copy()
    corner[:, 2] += 0.5 - 0.5 * matrix[:, :2].sum(axis=1)
    coefficients = tuple(corner.ravel().tolist())
    return np.asarray(
        image.transform(size, Image.Transform.AFFINE, coefficients, resample=resampling)
    )


def _levels(values: NDArray[np.floating[Any]]) -> Pixels:
    """Rounded to 8 bits."""
    return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)


def _inverse(matrix: Matrix) -> Matrix:
    """The affine map in the other direction."""
    if matrix.shape != (2, 3) or not np.isfinite(matrix).all():
        raise OptionError(f"matrix: received {list(matrix.shape)}, expected finite [2, 3]")
    if abs(float(np.linalg.det(matrix[:, :2]))) < 1e-12:
        raise OptionError("matrix: not invertible")
    linear = np.linalg.inv(matrix[:, :2])
    return np.concatenate([linear, -linear @ matrix[:, 2:]], axis=1)


def _bounds(inverse: Matrix, size: int, margin: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 (past the end) of the photo's pixels that a crop and a margin cover."""
    corners = np.array([[u, v, 1.0] for u in (-1.0, float(size)) for v in (-1.0, float(size))])
    points = corners @ inverse.T
    low = np.floor(points.min(axis=0)).astype(int) - margin
    high = np.ceil(points.max(axis=0)).astype(int) + margin + 1
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _support(mask: Mask) -> tuple[Matrix, Matrix]:
    """Middle (u, v) and half extents of the area where a mask is above zero."""
    v, u = np.nonzero(mask > 0)
    if not len(u):
        return np.full(2, (mask.shape[0] - 1) / 2.0), np.full(2, mask.shape[0] / 2.0)
    low, high = np.array([u.min(), v.min()], float), np.array([u.max(), v.max()], float)
    return (low + high) / 2.0, (high - low + 1.0) / 2.0


def _check_pastes(
    pixels: Pixels, crops: Sequence[Pixels], matrices: Sequence[Matrix], mask: Mask
) -> None:
    """Report every mismatch at once."""
    problems = []
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        problems.append(f"pixels: {pixels.dtype} {list(pixels.shape)}, expected uint8 [H, W, 3]")
    side = mask.shape[-1] if mask.ndim else 0
    shapes = (side, side), (len(crops), side, side)
    if mask.shape not in shapes or mask.dtype != np.float32:
        problems.append(
            f"mask: {mask.dtype} {list(mask.shape)}, expected float32 [S, S] or [F, S, S]"
        )
    if len(crops) != len(matrices):
        problems.append(f"{len(crops)} crops but {len(matrices)} matrices")
    for index, crop in enumerate(crops):
        if crop.shape != (*mask.shape[-2:], 3) or crop.dtype != np.uint8:
            expected = [*mask.shape[-2:], 3]
            problems.append(
                f"crop {index}: {crop.dtype} {list(crop.shape)}, expected uint8 {expected}"
            )
    if problems:
        raise OptionError("; ".join(problems))
