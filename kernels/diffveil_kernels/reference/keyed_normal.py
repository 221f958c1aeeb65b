"""Unit Gaussians from ChaCha20 keys: keystream (RFC 8439), then Box–Muller."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffveil_kernels.errors import KernelInputError
from diffveil_kernels.reference._arrays import Array, cast, namespace, span

__all__ = ["key_words", "keyed_normal", "keystream"]

_KEY_BYTES = 32
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
_LOW_32 = 0xFFFFFFFF


def key_words(keys: Sequence[bytes]) -> NDArray[np.int32]:
    """Keys of 32 bytes as the kernel takes them, int32 [N, 8].

    Raises:
        KernelInputError: A key has another length.
    """
    if any(len(key) != _KEY_BYTES for key in keys):
        raise KernelInputError(f"keys: expected {_KEY_BYTES} bytes each")
    return np.frombuffer(b"".join(keys), dtype="<i4").reshape(len(keys), 8)


def keystream(
    keys: Array, blocks: int, *, counter: int = 0, nonce: tuple[int, int, int] = (0, 0, 0)
) -> Array:
    """ChaCha20 keystreams (RFC 8439, section 2.4).

    Args:
        keys: int32 [N, 8], the words of the keys.
        blocks: Blocks of 64 bytes of each keystream.
        counter: Number of the first block.
        nonce: Three words, 0 … 2**32 - 1.

    Returns:
        int64 [N, 16 * blocks], words 0 … 2**32 - 1 in the order of the stream.
    """
    xp = namespace(keys)
    words = cast(keys, "int64") & _LOW_32
    counters = (span(blocks, keys) + counter)[None, :]
    zero = 0 * (words[:, :1] + counters)  # [N, blocks]
    start = [zero + constant for constant in _CONSTANTS]
    start += [zero + words[:, k : k + 1] for k in range(8)]
    start += [zero + counters, *(zero + word for word in nonce)]
    state = list(start)
    for _ in range(10):
        for a, b, c, d in (*_COLUMNS, *_DIAGONALS):
            for left, right, turned, bits in (
                *((a, b, d, 16), (c, d, b, 12)),
                *((a, b, d, 8), (c, d, b, 7)),
            ):
                state[left] = (state[left] + state[right]) & _LOW_32
                mixed = state[turned] ^ state[left]
                state[turned] = ((mixed << bits) | (mixed >> (32 - bits))) & _LOW_32
    stream = xp.stack([(s + t) & _LOW_32 for s, t in zip(state, start, strict=True)], -1)
    return stream.reshape(len(keys), -1)


def keyed_normal(keys: Array, count: int) -> Array:
    """Unit Gaussians, each row a function of its key alone.

    Box and Muller, "A Note on the Generation of Random Normal Deviates", 1958: words w, v of the
    keystream give sqrt(-2 ln u)·(cos φ, sin φ) with u = (w + ½)/2³² and φ = 2π(v + ½)/2³² - π/4.
    Blocks count from zero and the nonce is zero, so a key may serve one draw only.

    Args:
        keys: int32 [N, 8], the words of the keys.
        count: Numbers for each key.

    Returns:
        float32 [N, count].
    """
    xp = namespace(keys)
    words = keystream(keys, -(-count // 16)).reshape(len(keys), -1, 2)
    u = (cast(words[..., 0], "float64") + 0.5) * 2.0**-32
    angle = (cast(words[..., 1], "float64") + 0.5) * (math.pi * 2.0**-31) - math.pi / 4.0
    radius = xp.sqrt(-2.0 * xp.log(u))
    pairs = xp.stack([radius * xp.cos(angle), radius * xp.sin(angle)], -1)
    return cast(pairs, "float32").reshape(len(keys), -1)[:, :count]
