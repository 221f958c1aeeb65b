"""Faces out of photos and back in: antialiased crops, feathered pastes, for a batch of faces.

Three kernels: `face_reduce` brings each face's region to about the resolution that is asked for,
`face_crop` samples the reduced regions into normalised crops, `face_paste` blends reduced crops
into the photos in place. What the columns of the tables mean is written down in
`diffveil_kernels.geometry`. Levels are rounded where `diffveil.align` rounds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffveil_kernels.geometry import Integer, Number

__all__ = ["face_crop", "face_paste", "face_reduce"]

_INTEGERS = tl.constexpr(Integer.COUNT)
_NUMBERS = tl.constexpr(Number.COUNT)
_SOURCE = tl.constexpr(Integer.SOURCE)
_ROW, _COLUMN = tl.constexpr(Integer.ROW), tl.constexpr(Integer.COLUMN)
_CHANNEL = tl.constexpr(Integer.CHANNEL)
_HEIGHT, _WIDTH = tl.constexpr(Integer.HEIGHT), tl.constexpr(Integer.WIDTH)
_X0, _Y0 = tl.constexpr(Integer.X0), tl.constexpr(Integer.Y0)
_REGION = tl.constexpr(Integer.REGION_WIDTH)
_REDUCED = tl.constexpr(Integer.REDUCED_WIDTH)
_TAPS = tl.constexpr(Integer.TAPS_X)
_PHOTO = tl.constexpr(Integer.PHOTO)
_PHOTO_WIDTH = tl.constexpr(Integer.PHOTO_WIDTH)
_BOX = tl.constexpr(Integer.LEFT)
_FIRST, _LAST = tl.constexpr(Integer.FIRST), tl.constexpr(Integer.LAST)
_SCALE, _FILTER = tl.constexpr(Number.SCALE_X), tl.constexpr(Number.SUPPORT_X)
_SAMPLE, _PLACE = tl.constexpr(Number.SAMPLE), tl.constexpr(Number.PLACE)
_SUPPORT = tl.constexpr(Number.MIDDLE_U)
_OWNER_SHARPNESS = tl.constexpr(24.0)  # of the border between faces that overlap, in mask radii
_FAR = tl.constexpr(1e30)
_TINY = tl.constexpr(1e-37)


@triton.jit
def face_reduce(
    source, integers, numbers, reduced, capacity, FLOATING: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (m, n) computes `BLOCK` pixels of the reduced image of face n.

    Keys' cubic with a = -½ along each axis, stretched by the reduction, over the region alone.

    source: uint8, or floating point -1 … 1. integers: int64 [N, 22]. numbers: float64 [N, 20].
    reduced: uint8 [N, 3, capacity].
    """
    face = tl.program_id(1).to(tl.int64)
    row, values = integers + face * _INTEGERS, numbers + face * _NUMBERS
    width, height = tl.load(row + _REDUCED).to(tl.int32), tl.load(row + _REDUCED + 1).to(tl.int32)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < width * height
    first_x, from_x, inverse_x = _window(values, 0, index % width)
    first_y, from_y, inverse_y = _window(values, 1, index // width)
    region_x, region_y = tl.load(row + _REGION), tl.load(row + _REGION + 1)
    x0, y0 = tl.load(row + _X0), tl.load(row + _Y0)
    last_x, last_y = tl.load(row + _WIDTH) - 1, tl.load(row + _HEIGHT) - 1
    stride_x, stride_y = tl.load(row + _COLUMN), tl.load(row + _ROW)
    channel = tl.load(row + _CHANNEL)
    start = source + tl.load(row + _SOURCE)
    taps_x, taps_y = tl.load(row + _TAPS).to(tl.int32), tl.load(row + _TAPS + 1).to(tl.int32)

    red, green, blue = from_x * 0.0, from_x * 0.0, from_x * 0.0
    total_y = from_x * 0.0
    for step_y in range(0, taps_y):
        y = first_y + step_y
        counts_y = inside & (y >= 0) & (y < region_y)
        line = start + tl.minimum(tl.maximum(y + y0, 0), last_y) * stride_y
        r, g, b, total_x = from_x * 0.0, from_x * 0.0, from_x * 0.0, from_x * 0.0
        for step_x in range(0, taps_x):
            x = first_x + step_x
            counts = counts_y & (x >= 0) & (x < region_x)
            weight = tl.where(counts, _cubic((from_x + step_x) * inverse_x), 0.0)
            at = line + tl.minimum(tl.maximum(x + x0, 0), last_x) * stride_x
            value_r = tl.load(at, mask=counts, other=0).to(tl.float32)
            value_g = tl.load(at + channel, mask=counts, other=0).to(tl.float32)
            value_b = tl.load(at + 2 * channel, mask=counts, other=0).to(tl.float32)
            if FLOATING:
                value_r = _rounded((value_r + 1.0) * 127.5)
                value_g = _rounded((value_g + 1.0) * 127.5)
                value_b = _rounded((value_b + 1.0) * 127.5)
            r += weight * value_r
            g += weight * value_g
            b += weight * value_b
            total_x += weight
        weight = tl.where(counts_y, _cubic((from_y + step_y) * inverse_y), 0.0)
        total_x = tl.where(counts_y, total_x, 1.0)
        red += weight * _rounded(r / total_x)
        green += weight * _rounded(g / total_x)
        blue += weight * _rounded(b / total_x)
        total_y += weight
    total_y = tl.where(inside, total_y, 1.0)
    out = reduced + face * 3 * capacity + index
    tl.store(out, _rounded(red / total_y).to(tl.uint8), mask=inside)
    tl.store(out + capacity, _rounded(green / total_y).to(tl.uint8), mask=inside)
    tl.store(out + 2 * capacity, _rounded(blue / total_y).to(tl.uint8), mask=inside)


@triton.jit
def face_crop(reduced, integers, numbers, out, capacity, size, BLOCK: tl.constexpr):
    """Program (m, n) samples `BLOCK` pixels of the crop of face n.

    reduced: uint8 [N, 3, capacity]. integers: int64 [N, 22]. numbers: float64 [N, 20].
    out: floating point [N, 3, size, size], -1 … 1.
    """
    face = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    area = size * size
    inside = index < area
    red, green, blue = _bicubic(
        reduced, integers, numbers, face, capacity, index % size, index // size, inside
    )
    at = out + face * 3 * area + index
    kind = out.dtype.element_ty
    # Division as IEEE 754 rounds it: the CPU divides too.
    tl.store(at, (tl.div_rn(_rounded(red), 127.5) - 1.0).to(kind), mask=inside)
    tl.store(at + area, (tl.div_rn(_rounded(green), 127.5) - 1.0).to(kind), mask=inside)
    tl.store(at + 2 * area, (tl.div_rn(_rounded(blue), 127.5) - 1.0).to(kind), mask=inside)


@triton.jit
def face_paste(photos, reduced, mask, integers, numbers, capacity, size, BLOCK: tl.constexpr):
    """Program (m, n) blends `BLOCK` pixels of the photo around face n, in place.

    A pixel around several faces is blended once, with all of them, by the first one's program. Of
    masks that overlap, the face counts whose centre is nearer in that face's own size.

    photos: uint8, changed. reduced: uint8 [N, 3, capacity], the faces. mask: float32 [size, size].
    integers: int64 [N, 22]. numbers: float64 [N, 20].
    """
    face = tl.program_id(1).to(tl.int64)
    row = integers + face * _INTEGERS
    left, top = tl.load(row + _BOX), tl.load(row + _BOX + 1)
    width, height = tl.load(row + _BOX + 2) - left, tl.load(row + _BOX + 3) - top
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = index < width * height
    x, y = left + index % tl.maximum(width, 1), top + index // tl.maximum(width, 1)
    first, last = tl.load(row + _FIRST).to(tl.int32), tl.load(row + _LAST).to(tl.int32)
    for other in range(first, face.to(tl.int32)):
        box = integers + other * _INTEGERS + _BOX
        apart = (x < tl.load(box)) | (x >= tl.load(box + 2))
        mine = mine & (apart | (y < tl.load(box + 1)) | (y >= tl.load(box + 3)))

    at = photos + tl.load(row + _PHOTO) + (y * tl.load(row + _PHOTO_WIDTH) + x) * 3
    red = tl.load(at, mask=mine, other=0).to(tl.float32)
    green = tl.load(at + 1, mask=mine, other=0).to(tl.float32)
    blue = tl.load(at + 2, mask=mine, other=0).to(tl.float32)
    to_red, to_green, to_blue = red * 0.0, red * 0.0, red * 0.0
    total, cover, nearest = red * 0.0, red * 0.0, red * 0.0 + _FAR
    for other in range(first, last):
        weight, radius = _placed(numbers + other * _NUMBERS, mask, size, x, y, mine)
        hit = mine & (weight > 0.0)
        r, g, b = _bicubic(reduced, integers, numbers, other, capacity, x, y, hit)
        closest = tl.where(hit, tl.minimum(nearest, radius), nearest)
        # What was added up so far was measured from a face that may not be the nearest.
        kept = tl.exp((closest - nearest) * _OWNER_SHARPNESS)
        behind = tl.where(hit, closest - radius, 0.0)
        share = tl.where(hit, weight * tl.exp(behind * _OWNER_SHARPNESS), 0.0)
        to_red = to_red * kept + share * (r - red)
        to_green = to_green * kept + share * (g - green)
        to_blue = to_blue * kept + share * (b - blue)
        total = total * kept + share
        cover = tl.where(hit, tl.maximum(cover, weight), cover)
        nearest = closest
    changed = mine & (cover > 0.0)
    part = cover / tl.maximum(total, _TINY)
    tl.store(at, _rounded(red + part * to_red).to(tl.uint8), mask=changed)
    tl.store(at + 1, _rounded(green + part * to_green).to(tl.uint8), mask=changed)
    tl.store(at + 2, _rounded(blue + part * to_blue).to(tl.uint8), mask=changed)


@triton.jit
def _window(values, AXIS: tl.constexpr, index):
    """First pixel that a reduced pixel is made of, its distance, and the filter's 1 / scale."""
    scale = tl.load(values + _SCALE + AXIS)
    centre = (index.to(tl.float64) + 0.5) * scale
    first = tl.floor(centre - tl.load(values + _FILTER + AXIS) + 0.5)
    return first.to(tl.int64), (first + 0.5 - centre).to(tl.float32), (1.0 / scale).to(tl.float32)


@triton.jit
def _bicubic(reduced, integers, numbers, face, capacity, x, y, inside):
    """Red, green and blue of a face's reduced image where output pixel (x, y) falls, float32.

    Keys' cubic with a = -1; border pixels repeat.
    """
    row, m = integers + face * _INTEGERS, numbers + face * _NUMBERS + _SAMPLE
    width, height = tl.load(row + _REDUCED), tl.load(row + _REDUCED + 1)
    u = tl.load(m) * x + tl.load(m + 1) * y + tl.load(m + 2)
    v = tl.load(m + 3) * x + tl.load(m + 4) * y + tl.load(m + 5)
    left, top = tl.floor(u), tl.floor(v)
    du, dv = (u - left).to(tl.float32), (v - top).to(tl.float32)
    column, line = left.to(tl.int64), top.to(tl.int64)
    start = reduced + face * 3 * capacity
    red, green, blue = du * 0.0, du * 0.0, du * 0.0
    for j in tl.static_range(4):
        along = start + tl.minimum(tl.maximum(line + (j - 1), 0), height - 1) * width
        for i in tl.static_range(4):
            weight = _sharp_cubic(du - (i - 1)) * _sharp_cubic(dv - (j - 1))
            at = along + tl.minimum(tl.maximum(column + (i - 1), 0), width - 1)
            red += weight * tl.load(at, mask=inside, other=0).to(tl.float32)
            green += weight * tl.load(at + capacity, mask=inside, other=0).to(tl.float32)
            blue += weight * tl.load(at + 2 * capacity, mask=inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _placed(values, mask, size, x, y, mine):
    """The mask at photo pixels, bilinear and zero outside, and the distance from its middle."""
    m = values + _PLACE
    u = tl.load(m) * x + tl.load(m + 1) * y + tl.load(m + 2)
    v = tl.load(m + 3) * x + tl.load(m + 4) * y + tl.load(m + 5)
    within = mine & (u >= -0.5) & (u < size - 0.5) & (v >= -0.5) & (v < size - 0.5)
    left, top = tl.floor(u), tl.floor(v)
    du, dv = (u - left).to(tl.float32), (v - top).to(tl.float32)
    u0, v0 = tl.maximum(left.to(tl.int32), 0), tl.maximum(top.to(tl.int32), 0)
    u1 = tl.minimum(left.to(tl.int32) + 1, size - 1)
    v1 = tl.minimum(top.to(tl.int32) + 1, size - 1)
    upper = tl.load(mask + v0 * size + u0, mask=within, other=0.0) * (1.0 - du)
    upper += tl.load(mask + v0 * size + u1, mask=within, other=0.0) * du
    lower = tl.load(mask + v1 * size + u0, mask=within, other=0.0) * (1.0 - du)
    lower += tl.load(mask + v1 * size + u1, mask=within, other=0.0) * du
    weight = tl.minimum(tl.maximum(upper * (1.0 - dv) + lower * dv, 0.0), 1.0)
    s = values + _SUPPORT
    across = ((u - tl.load(s)) / tl.load(s + 2)).to(tl.float32)
    along = ((v - tl.load(s + 1)) / tl.load(s + 3)).to(tl.float32)
    return weight, tl.sqrt(across * across + along * along)


@triton.jit
def _cubic(t):
    """Keys, IEEE TASSP 29(6), 1981, with a = -½: of antialiasing."""
    t = tl.abs(t)
    near = (1.5 * t - 2.5) * t * t + 1.0
    far = ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
    return tl.where(t < 1.0, near, tl.where(t < 2.0, far, 0.0))


@triton.jit
def _sharp_cubic(t):
    """The same with a = -1, as Pillow interpolates."""
    t = tl.abs(t)
    near = (t - 2.0) * t * t + 1.0
    far = ((5.0 - t) * t - 8.0) * t + 4.0
    return tl.where(t < 1.0, near, tl.where(t < 2.0, far, 0.0))


@triton.jit
def _rounded(value):
    """The nearest of 0 … 255."""
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0)
