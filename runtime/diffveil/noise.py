"""Noise as a pure function of a key: ChaCha20 keystream, then Box–Muller.

There is no generator and no state: the numbers depend on the key and nothing else, so they are the
same for any batch size, order of calls, machine and NumPy version. What makes the last two hold:

* the keystream is integer arithmetic (RFC 8439);
* logarithm, sine and cosine are series evaluated here, by float64 additions, multiplications and
  one division, plus a square root. IEEE 754 defines the rounding of each of these, and each is a
  NumPy call of its own, so no compiler can fuse two. ``numpy.log`` and ``numpy.cos``, in contrast,
  differ in the last bits between processors and releases.
"""

from __future__ import annotations

import hmac
import math
import operator
import secrets
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from diffveil.errors import OptionError

__all__ = ["NoiseKey", "chacha20_keystream", "normal"]

_KEY_BYTES = 32
_BLOCK_BYTES = 64
_SALT = b"diffveil/v1/noise"


class NoiseKey:
    """An opaque key that noise is derived from.

    It has no arithmetic, no indexing and no readable form. Use a key for one purpose only: derive
    another for each purpose, and draw from the derived one.
    """

    __slots__ = ("_material",)

    _material: bytes

    def __init__(self) -> None:
        raise TypeError("use NoiseKey.from_seed, NoiseKey.from_bytes or NoiseKey.random")

    @classmethod
    def from_seed(cls, seed: int) -> NoiseKey:
        """Key for reproducible results; whoever knows the seed can redraw the noise.

        Args:
            seed: 0 … 2**256 - 1.

        Raises:
            OptionError: The seed is out of range.
        """
        return cls._wrap(_hkdf_extract(b"seed" + _encode(seed, "seed")))

    @classmethod
    def from_bytes(cls, material: bytes) -> NoiseKey:
        """Key from 32 bytes that are secret, uniform and used for nothing else.

        Raises:
            OptionError: There are not 32 bytes.
        """
        if len(material) != _KEY_BYTES:
            raise OptionError(f"a noise key has {_KEY_BYTES} bytes, received {len(material)}")
        return cls._wrap(_hkdf_extract(b"bytes" + bytes(material)))

    @classmethod
    def random(cls) -> NoiseKey:
        """Fresh key from the operating system."""
        return cls.from_bytes(secrets.token_bytes(_KEY_BYTES))

    def derive(self, label: str, *indices: int) -> NoiseKey:
        """Independent key for one purpose (HKDF-Expand with SHA-256, RFC 5869).

        Different labels or indices give unrelated keys; ``derive("a", 1).derive("b")`` and
        ``derive("a", 1, …)`` never meet.

        Args:
            label: What the key is for, for example ``"start"``.
            indices: Which one, for example face and variant; each 0 … 2**256 - 1.

        Raises:
            OptionError: The label is empty or an index is out of range.
        """
        text = label.encode()
        if not text:
            raise OptionError("the label of a derived noise key is empty")
        # Lengths first: no two pairs of label and indices share an encoding.
        info = len(text).to_bytes(4, "big") + text + len(indices).to_bytes(4, "big")
        info += b"".join(_encode(index, f"index of {label!r}") for index in indices)
        return self._wrap(hmac.digest(self._material, info + b"\x01", "sha256"))

    @classmethod
    def _wrap(cls, material: bytes) -> NoiseKey:
        key = object.__new__(cls)
        object.__setattr__(key, "_material", material)
        return key

    def words(self, count: int) -> NDArray[np.uint32]:
        """The beginning of the key's stream as `count` uniform words of 32 bits, uint32 [count]."""
        return np.frombuffer(self._keystream(4 * count), dtype="<u4").astype(np.uint32)

    def _keystream(self, length: int) -> bytes:
        return chacha20_keystream(self._material, length)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a noise key cannot be changed")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a noise key cannot be changed")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseKey):
            return NotImplemented
        return hmac.compare_digest(self._material, other._material)

    def __hash__(self) -> int:
        return hash((NoiseKey, self._material))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a noise key cannot be pickled or copied")

    def __repr__(self) -> str:
        return "NoiseKey(<redacted>)"


def normal(key: NoiseKey, shape: Sequence[int]) -> NDArray[np.float32]:
    """Unit Gaussian noise, the same for the same key everywhere.

    Box and Muller, "A Note on the Generation of Random Normal Deviates", 1958. Values depend on
    their position alone: a shorter draw is the beginning of a longer one.

    Args:
        key: Key used for nothing else.
        shape: Shape of the result; the last axis varies fastest.

    Returns:
        Independent unit Gaussians of that shape, float32, of magnitude at most 6.8.

    Raises:
        OptionError: The shape has a negative axis.
    """
    if any(axis < 0 for axis in shape):
        raise OptionError(f"shape is {list(shape)}, expected no negative axis")
    count = math.prod(shape)
    pairs = (count + 1) // 2
    words = np.frombuffer(key._keystream(8 * pairs), dtype="<u4").reshape(pairs, 2)
    # Half a unit in: the logarithm never sees zero and the distribution is symmetric.
    radius = np.sqrt(-2.0 * _log((words[:, 0].astype(np.float64) + 0.5) * 2.0**-32))
    cosine, sine = _unit_circle(words[:, 1])
    values = np.empty((pairs, 2), dtype=np.float32)
    values[:, 0] = radius * cosine
    values[:, 1] = radius * sine
    return values.reshape(-1)[:count].reshape(tuple(shape))


def chacha20_keystream(
    key: bytes, length: int, *, nonce: bytes = bytes(12), counter: int = 0
) -> bytes:
    """ChaCha20 keystream (RFC 8439, section 2.4), all blocks at once.

    Args:
        key: 32 bytes.
        length: Number of bytes wanted.
        nonce: 12 bytes. A key that serves one stream only can leave it at zero.
        counter: Number of the first block.

    Raises:
        OptionError: Key or nonce has another length, or the block counter would overflow.
    """
    blocks = -(-length // _BLOCK_BYTES)
    if len(key) != _KEY_BYTES or len(nonce) != 12:
        raise OptionError("ChaCha20 needs a key of 32 bytes and a nonce of 12 bytes")
    if length < 0 or counter < 0 or counter + blocks > 2**32:
        raise OptionError("ChaCha20 gives at most 2**32 blocks of 64 bytes for one key")
    # Rows of the RFC's 4 x 4 state as [4, blocks]: a column round is one vector operation.
    start = np.empty((4, 4, blocks), dtype=np.uint32)
    start[0] = np.frombuffer(b"expand 32-byte k", dtype="<u4")[:, None]
    start[1:3] = np.frombuffer(key, dtype="<u4").reshape(2, 4, 1)
    start[3, 0] = (np.arange(blocks, dtype=np.uint64) + np.uint64(counter)).astype(np.uint32)
    start[3, 1:] = np.frombuffer(nonce, dtype="<u4")[:, None]
    a, b, c, d = (row.copy() for row in start)
    for _ in range(10):
        a, b, c, d = _quarter_rounds(a, b, c, d)
        # Rotating the rows turns diagonals into columns, and back.
        b, c, d = np.roll(b, -1, axis=0), np.roll(c, -2, axis=0), np.roll(d, -3, axis=0)
        a, b, c, d = _quarter_rounds(a, b, c, d)
        b, c, d = np.roll(b, 1, axis=0), np.roll(c, 2, axis=0), np.roll(d, 3, axis=0)
    state = (np.stack((a, b, c, d)) + start).reshape(16, blocks)
    return np.ascontiguousarray(state.T).astype("<u4").tobytes()[:length]


_Words = NDArray[np.uint32]


def _quarter_rounds(
    a: _Words, b: _Words, c: _Words, d: _Words
) -> tuple[_Words, _Words, _Words, _Words]:
    """The quarter round of RFC 8439, section 2.1, on every column."""
    a = a + b
    d = _rotate_left(d ^ a, 16)
    c = c + d
    b = _rotate_left(b ^ c, 12)
    a = a + b
    d = _rotate_left(d ^ a, 8)
    c = c + d
    b = _rotate_left(b ^ c, 7)
    return a, b, c, d


def _rotate_left(words: _Words, bits: int) -> _Words:
    rotated: _Words = (words << np.uint32(bits)) | (words >> np.uint32(32 - bits))
    return rotated


# Enough terms that the first one left out is below half a unit in the last place of a float64.
# Quotients of integers and literals: no constant depends on a mathematical library either.
_LN_2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_ATANH = tuple(1.0 / (2 * k + 1) for k in range(12))
_SINE = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(10))
_COSINE = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(10))


def _horner(coefficients: Sequence[float], x: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total *= x
        total += coefficient
    return total


def _log(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive numbers: exponent · ln 2 + 2 atanh((m − 1) / (m + 1))."""
    mantissa, exponent = np.frexp(u)
    low = mantissa < _SQRT_HALF
    mantissa = np.where(low, 2.0 * mantissa, mantissa)
    power = (exponent - low).astype(np.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return power * _LN_2 + 2.0 * s * _horner(_ATANH, s * s)


def _unit_circle(words: _Words) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points evenly spread over the circle: two bits choose a quadrant, thirty an angle in it."""
    angle = ((words & np.uint32(2**30 - 1)).astype(np.float64) + (0.5 - 2.0**29)) * (
        math.pi * 2.0**-31
    )
    square = angle * angle
    cosine, sine = _horner(_COSINE, square), angle * _horner(_SINE, square)
    quadrant = words >> np.uint32(30)
    odd, half = (quadrant & 1) == 1, quadrant >= 2
    x, y = np.where(odd, -sine, cosine), np.where(odd, cosine, sine)
    return np.where(half, -x, x), np.where(half, -y, y)


def _hkdf_extract(material: bytes) -> bytes:
    """HKDF-Extract with SHA-256 (RFC 5869, section 2.2)."""
    return hmac.digest(_SALT, material, "sha256")


def _encode(value: int, what: str) -> bytes:
    number = operator.index(value)
    if not 0 <= number < 2**256:
        raise OptionError(f"{what} is out of range, expected 0 to 2**256 - 1")
    return number.to_bytes(32, "big")
