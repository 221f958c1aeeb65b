"""Faces out of photos and back in, one face after the other, by dense filter matrices."""

from __future__ import annotations

from diffveil_kernels.geometry import FaceTable, Integer, Number
from diffveil_kernels.reference._arrays import Array, cast, namespace, span

__all__ = ["face_crop", "face_paste"]

_OWNER_SHARPNESS = 24.0


def face_crop(photos: Array, table: FaceTable, dtype: str = "float32") -> Array:
    """Aligned crops.

    Args:
        photos: uint8, the photos of the table one after the other, each [H, W, 3].
        table: From `diffveil_kernels.geometry.crop_table`.
        dtype: ``"float32"`` or ``"float16"``.

    Returns:
        [N, 3, S, S], RGB in -1 … 1, of that dtype.
    """
    xp = namespace(photos)
    crops = []
    for row, values in zip(table.integers.tolist(), table.numbers.tolist(), strict=True):
        height, width = row[Integer.HEIGHT], row[Integer.WIDTH]
        start = row[Integer.SOURCE]
        photo = photos[start : start + 3 * height * width].reshape(height, width, 3)
        y = row[Integer.Y0] + span(row[Integer.REGION_HEIGHT], photos)
        x = row[Integer.X0] + span(row[Integer.REGION_WIDTH], photos)
        region = photo[y.clip(0, height - 1)][:, x.clip(0, width - 1)]
        reduced = _reduced(cast(xp.moveaxis(region, 2, 0), "float64"), values)
        pixels = span(table.size, photos)
        levels = _levels(_bicubic(reduced, values, pixels[None, :], pixels[:, None]))
        crops.append(cast(cast(levels, "float32") / 127.5 - 1.0, dtype))
    return xp.stack(crops)


def face_paste(photos: Array, crops: Array, mask: Array, table: FaceTable) -> Array:
    """Photos with faces blended in.

    A pixel changes only where a face's mask is above zero. Where faces overlap, every pixel belongs
    to the face whose centre is nearer, measured in that face's own size.

    Args:
        photos: uint8, the photos of the table one after the other, each [H, W, 3].
        crops: [N, 3, S, S], floating point, RGB in -1 … 1; beyond, they are clipped.
        mask: float32 [S, S], that of the table.
        table: From `diffveil_kernels.geometry.paste_table`.

    Returns:
        uint8, like photos.
    """
    xp = namespace(photos)
    rows, numbers = table.integers.tolist(), table.numbers.tolist()
    levels = _levels((cast(crops, "float64") + 1.0) * 127.5)
    faces = [_reduced(crop, values) for crop, values in zip(levels, numbers, strict=True)]
    result = xp.asarray(photos) + 0
    for row in rows:
        x = row[Integer.LEFT] + span(row[Integer.RIGHT] - row[Integer.LEFT], photos)[None, :]
        y = row[Integer.TOP] + span(row[Integer.BOTTOM] - row[Integer.TOP], photos)[:, None]
        if not x.shape[1] or not y.shape[0]:
            continue
        at = row[Integer.PHOTO] + (y * row[Integer.PHOTO_WIDTH] + x) * 3
        photo = xp.stack([cast(photos[at + channel], "float64") for channel in range(3)])
        own = range(row[Integer.FIRST], row[Integer.LAST])
        placed = [_placed(mask, numbers[face], x, y) for face in own]
        nearest = xp.stack([radius for _, radius in placed]).min(0)
        nearest = nearest if not isinstance(nearest, tuple) else nearest[0]  # PyTorch: and where
        cover, total, change = 0.0 * nearest, 0.0 * nearest, 0.0 * photo
        for face, (weight, radius) in zip(own, placed, strict=True):
            share = weight * xp.exp(_OWNER_SHARPNESS * (nearest - radius))
            change = change + share * (_bicubic(faces[face], numbers[face], x, y) - photo)
            cover, total = xp.maximum(cover, weight), total + share
        # In a pixel without a face the change is zero, and so may its divisor be.
        blended = _levels(photo + cover * change / xp.where(total > 0, total, 1.0))
        for channel in range(3):
            result[at + channel] = cast(blended[channel], "uint8")
    return result


def _reduced(image: Array, values: list[float]) -> Array:
    """An image, levels [3, h, w], at the table's reduced resolution: along x, then along y."""
    horizontal = _filter(image, image.shape[2], values[Number.SCALE_X])
    vertical = _filter(image, image.shape[1], values[Number.SCALE_Y])
    return _levels(vertical @ _levels(image @ horizontal.T))


def _filter(like: Array, side: int, scale: float) -> Array:
    """Weights [reduced side, side] of antialiasing along one axis, float64; rows sum to 1."""
    pixels = cast(span(side, like), "float64") + 0.5
    centres = (cast(span(round(side / scale), like), "float64") + 0.5) * scale
    weights = _cubic((pixels[None, :] - centres[:, None]) / scale, -0.5)
    return weights / weights.sum(1)[:, None]


def _bicubic(image: Array, values: list[float], x: Array, y: Array) -> Array:
    """Levels [3, h, w] of an image where output pixels fall; border pixels repeat."""
    m = values[Number.SAMPLE : Number.SAMPLE + 6]
    u, v = m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]
    xp = namespace(image)
    left, top = xp.floor(u), xp.floor(v)
    height, width = image.shape[1:]
    total = 0.0
    for j in range(-1, 3):
        line = cast(top + j, "int64").clip(0, height - 1)
        for i in range(-1, 3):
            column = cast(left + i, "int64").clip(0, width - 1)
            weight = _cubic(u - left - i, -1.0) * _cubic(v - top - j, -1.0)
            total = total + weight * image[:, line, column]
    return total


def _placed(mask: Array, values: list[float], x: Array, y: Array) -> tuple[Array, Array]:
    """The mask at photo pixels, bilinear and zero outside, and the distance from its middle."""
    xp = namespace(mask)
    size = mask.shape[0]
    m = values[Number.PLACE : Number.PLACE + 6]
    u, v = m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]
    left, top = xp.floor(u), xp.floor(v)
    weight = 0.0
    for j in range(2):
        line = cast(top + j, "int64").clip(0, size - 1)
        for i in range(2):
            column = cast(left + i, "int64").clip(0, size - 1)
            part = (1.0 - abs(u - left - i)) * (1.0 - abs(v - top - j))
            weight = weight + part * cast(mask, "float64")[line, column]
    within = (u >= -0.5) & (u < size - 0.5) & (v >= -0.5) & (v < size - 0.5)
    middle_u, middle_v, extent_u, extent_v = values[Number.MIDDLE_U :]
    radius = xp.hypot((u - middle_u) / extent_u, (v - middle_v) / extent_v)
    return xp.where(within, weight, 0.0).clip(0.0, 1.0), radius


def _cubic(t: Array, a: float) -> Array:
    """Keys, "Cubic Convolution Interpolation for Digital Image Processing", IEEE TASSP 29(6)."""
    xp = namespace(t)
    t = abs(t)
    near = ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0
    far = a * (((t - 5.0) * t + 8.0) * t - 4.0)
    return xp.where(t < 1.0, near, xp.where(t < 2.0, far, 0.0))


def _levels(values: Array) -> Array:
    """The nearest of 0 … 255, in floating point."""
    return namespace(values).floor(values + 0.5).clip(0.0, 255.0)
