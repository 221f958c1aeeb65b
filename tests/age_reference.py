"""A second implementation of age v1, in plain Python: the oracle of the key-file tests.

It writes passphrase files at a work factor that takes no time, headers that are hostile but carry a
valid MAC, and reads what the product sealed. Slow, not constant-time, and only for tests.

Sources: https://c2sp.org/age; RFC 8439 (ChaCha20-Poly1305); RFC 7748 (X25519); RFC 5869 (HKDF);
RFC 7914 (scrypt); BIP 173 (Bech32). `test_keyfile.py` checks it against the RFCs' own vectors.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct

INTRO = b"age-encryption.org/v1\n"
_CHUNK = 64 << 10
_BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, 32 bytes."""
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\1", "sha256")


def chacha20(key: bytes, counter: int, nonce: bytes, data: bytes) -> bytes:
    """RFC 8439 section 2.4."""
    out = bytearray()
    for index in range(0, len(data), 64):
        start = [
            *struct.unpack("<4I", b"expand 32-byte k"),
            *struct.unpack("<8I", key),
            counter + index // 64,
            *struct.unpack("<3I", nonce),
        ]
        state = start.copy()
        for _ in range(10):
            for column in range(4):
                _quarter(state, column, 4 + column, 8 + column, 12 + column)
            for column in range(4):
                _quarter(
                    state,
                    column,
                    4 + (column + 1) % 4,
                    8 + (column + 2) % 4,
                    12 + (column + 3) % 4,
                )
        block = struct.pack(
            "<16I", *((a + b) & 0xFFFFFFFF for a, b in zip(state, start, strict=True))
        )
        out += bytes(a ^ b for a, b in zip(data[index : index + 64], block, strict=False))
    return bytes(out)


def _quarter(x: list[int], a: int, b: int, c: int, d: int) -> None:
    for target, source, mixed, shift in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        x[target] = (x[target] + x[source]) & 0xFFFFFFFF
        value = x[mixed] ^ x[target]
        x[mixed] = (value << shift | value >> (32 - shift)) & 0xFFFFFFFF


def _tag(key: bytes, nonce: bytes, ciphertext: bytes) -> bytes:
    one_time = chacha20(key, 0, nonce, bytes(32))
    r = int.from_bytes(one_time[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    message = ciphertext + bytes(-len(ciphertext) % 16) + struct.pack("<QQ", 0, len(ciphertext))
    total = 0
    for index in range(0, len(message), 16):
        block = int.from_bytes(message[index : index + 16] + b"\1", "little")
        total = (total + block) * r % ((1 << 130) - 5)
    return ((total + int.from_bytes(one_time[16:], "little")) % (1 << 128)).to_bytes(16, "little")


def encrypt(key: bytes, nonce: bytes, plain: bytes) -> bytes:
    """ChaCha20-Poly1305 without associated data."""
    ciphertext = chacha20(key, 1, nonce, plain)
    return ciphertext + _tag(key, nonce, ciphertext)


def decrypt(key: bytes, nonce: bytes, sealed: bytes) -> bytes:
    """The inverse of `encrypt`; ValueError where the tag differs."""
    if not hmac.compare_digest(_tag(key, nonce, sealed[:-16]), sealed[-16:]):
        raise ValueError("tag")
    return chacha20(key, 1, nonce, sealed[:-16])


def x25519(scalar: bytes, point: bytes) -> bytes:
    """RFC 7748 section 5, by the Montgomery ladder."""
    p = (1 << 255) - 19
    k = (int.from_bytes(scalar, "little") & ~7 & ~(128 << 248)) | (64 << 248)
    u = int.from_bytes(point, "little") & ((1 << 255) - 1)
    x2, z2, x3, z3, swap = 1, 0, u, 1, 0
    for bit in reversed(range(255)):
        if swap ^ (k >> bit & 1):
            x2, z2, x3, z3 = x3, z3, x2, z2
        swap = k >> bit & 1
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb, aa, bb = d * a, c * b, a * a, b * b
        x3, z3 = pow(da + cb, 2, p), u * pow(da - cb, 2, p) % p
        x2, z2 = aa * bb % p, (aa - bb) * (aa + 121665 * (aa - bb)) % p
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, p - 2, p) % p).to_bytes(32, "little")


def bech32_bytes(text: str) -> bytes:
    """The 32 bytes of an age recipient or identity; the checksum is not looked at."""
    lower = text.lower()
    value = 0
    for character in lower[lower.rindex("1") + 1 : -6]:
        value = value << 5 | _BECH32.index(character)
    return (value >> 4).to_bytes(32, "big")  # 52 characters hold 260 bits


def b64(data: bytes) -> str:
    """Base64 without padding."""
    return base64.b64encode(data).decode("ascii").rstrip("=")


def unb64(text: str) -> bytes:
    """The inverse of `b64`."""
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def assemble(file_key: bytes, stanzas: str, payload: bytes) -> bytes:
    """Put a whole file together around stanzas that wrap (or claim to wrap) the file key."""
    header = INTRO + stanzas.encode("ascii") + b"---"
    mac = hmac.digest(hkdf(file_key, b"", b"header"), header, "sha256")
    nonce = bytes(range(16))
    key = hkdf(file_key, nonce, b"payload")
    chunks = [payload[i : i + _CHUNK] for i in range(0, len(payload), _CHUNK)] or [b""]
    sealed = b"".join(
        encrypt(key, _stream_nonce(i, last=i == len(chunks) - 1), chunk)
        for i, chunk in enumerate(chunks)
    )
    return header + b" " + b64(mac).encode("ascii") + b"\n" + nonce + sealed


def seal_scrypt(payload: bytes, passphrase: str, factor: int = 1) -> bytes:
    """Seal to a passphrase at a work factor of one's choice."""
    file_key, salt = bytes(range(100, 116)), bytes(range(16))
    wrap = hashlib.scrypt(
        passphrase.encode(),
        salt=b"age-encryption.org/v1/scrypt" + salt,
        n=1 << factor,
        r=8,
        p=1,
        dklen=32,
    )
    body = b64(encrypt(wrap, bytes(12), file_key))
    return assemble(file_key, f"-> scrypt {b64(salt)} {factor}\n{body}\n", payload)


def open_x25519(data: bytes, identity: str) -> bytes:
    """Open a file that is sealed to recipients, by one identity."""
    end = data.index(b"\n", data.index(b"\n--- ") + 1)
    header, body = data[:end], data[end + 1 :]
    secret = bech32_bytes(identity)
    public = x25519(secret, (9).to_bytes(32, "little"))
    lines = header.decode("ascii").split("\n")
    for index, line in enumerate(lines):
        if not line.startswith("-> X25519 "):
            continue
        share = unb64(line.split(" ")[2])
        key = hkdf(x25519(secret, share), share + public, b"age-encryption.org/v1/X25519")
        try:
            file_key = decrypt(key, bytes(12), unb64(lines[index + 1]))
        except ValueError:
            continue
        break
    else:
        raise ValueError("no stanza opens")
    signed = header[: header.index(b"\n--- ") + 4]
    mac = hmac.digest(hkdf(file_key, b"", b"header"), signed, "sha256")
    if mac != unb64(lines[-1][4:]):
        raise ValueError("header MAC")
    key = hkdf(file_key, body[:16], b"payload")
    sealed = body[16:]
    chunks = [sealed[i : i + _CHUNK + 16] for i in range(0, len(sealed), _CHUNK + 16)]
    return b"".join(
        decrypt(key, _stream_nonce(i, last=i == len(chunks) - 1), chunk)
        for i, chunk in enumerate(chunks)
    )


def _stream_nonce(index: int, *, last: bool) -> bytes:
    return index.to_bytes(11, "big") + bytes([last])
