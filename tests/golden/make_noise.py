"""Write noise.txt: ``python tests/golden/make_noise.py > tests/golden/noise.txt``.

Independent of diffveil: ChaCha20 one word at a time as in RFC 8439, HKDF from hmac as in RFC 5869,
Box–Muller in decimal arithmetic of 60 digits, rounded to float32 once.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import sys
from decimal import Decimal, getcontext

getcontext().prec = 60
MASK = 0xFFFFFFFF
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def quarter_round(s: list[int], a: int, b: int, c: int, d: int) -> None:
    for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        s[x] = (s[x] + s[y]) & MASK
        s[z] ^= s[x]
        s[z] = ((s[z] << bits) | (s[z] >> (32 - bits))) & MASK


def chacha20_block(key: bytes, counter: int) -> list[int]:
    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter, 0, 0]
    start.append(0)
    s = list(start)
    for _ in range(10):
        for column in range(4):
            quarter_round(s, column, column + 4, column + 8, column + 12)
        quarter_round(s, 0, 5, 10, 15)
        quarter_round(s, 1, 6, 11, 12)
        quarter_round(s, 2, 7, 8, 13)
        quarter_round(s, 3, 4, 9, 14)
    return [(x + y) & MASK for x, y in zip(s, start, strict=True)]


def cosine_and_sine(angle: Decimal) -> tuple[Decimal, Decimal]:
    sums, term = [Decimal(0), Decimal(0)], Decimal(1)
    for k in range(80):
        sums[k % 2] += term if k % 4 < 2 else -term
        term *= angle / (k + 1)
    return sums[0], sums[1]


def normals(key: bytes, count: int) -> list[float]:
    words: list[int] = []
    while len(words) < count + 1:
        words += chacha20_block(key, len(words) // 16)
    values: list[float] = []
    for radial, angular in zip(words[0:count:2], words[1 : count + 1 : 2], strict=True):
        u = (Decimal(radial) + Decimal("0.5")) / 2**32
        radius = (-2 * u.ln()).sqrt()
        # Quadrant q, and an angle of -45° … 45° about its axis.
        q, rest = angular >> 30, angular & (2**30 - 1)
        angle = PI / 2 * q + PI / 2 * (Decimal(rest) + Decimal("0.5")) / 2**30 - PI / 4
        values += [float(radius * value) for value in cosine_and_sine(angle)]
    return values[:count]


def noise_key(seed: int, label: str, indices: list[int]) -> bytes:
    material = b"seed" + seed.to_bytes(32, "big")
    prk = hmac.new(b"diffveil/v1/noise", material, hashlib.sha256).digest()
    text = label.encode()
    info = struct.pack(">I", len(text)) + text + struct.pack(">I", len(indices))
    info += b"".join(index.to_bytes(32, "big") for index in indices)
    return hmac.new(prk, info + b"\x01", hashlib.sha256).digest()


def main() -> None:
    out = sys.stdout.write
    out("# First values of normal(NoiseKey.from_seed(seed).derive(label, *indices)), float32,\n")
    out("# little-endian, hexadecimal. Written by make_noise.py, which shares no code with\n")
    out("# diffveil. These bytes are a promise to users: a change makes seeds mean other faces.\n")
    cases: list[tuple[int, str, list[int]]] = [
        (0, "golden", []),
        (0, "golden", [0]),
        (1, "start", [3, 7]),
        (2**64 - 1, "größe", [2**256 - 1]),
    ]
    for seed, label, indices in cases:
        values = normals(noise_key(seed, label, indices), 40)
        out(f"\nseed: {seed}\nlabel: {label}\nindices: {' '.join(map(str, indices))}\n")
        out(f"expect: {struct.pack('<40f', *values).hex()}\n")


if __name__ == "__main__":
    main()
