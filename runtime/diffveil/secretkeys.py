"""What a person keeps in mind or a service in a vault, as a key that others are derived from.

For pictures that carry their faces, and for pseudonyms: nothing is stored beside the picture, so no
salt is either. The stretching is the same for everybody, and only a passphrase that nobody guesses
protects; see docs/carried.md.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

from diffveil.errors import OptionError
from diffveil.keysecrets import check_passphrase
from diffveil.noise import NoiseKey

__all__ = ["SecretSource", "secret_key"]

SecretSource: TypeAlias = "str | bytes | NoiseKey"
"""What a key is made from: a passphrase, 32 random bytes, or a key made elsewhere."""

# scrypt (RFC 7914): 128 MiB and about half a second a guess.
_COST, _BLOCKS = 2**17, 8
_SALT = b"diffveil/v1/secret"


def secret_key(secret: SecretSource) -> NoiseKey:
    """The key of a secret.

    Raises:
        OptionError: It is none, or a weak passphrase; the message does not quote it.
    """
    if isinstance(secret, NoiseKey):
        return secret
    if isinstance(secret, bytes | bytearray):
        return NoiseKey.from_bytes(bytes(secret))
    if not isinstance(secret, str):
        raise OptionError(
            f"secret: received {type(secret).__name__}, expected a passphrase (str), 32 random "
            "bytes or a NoiseKey"
        )
    check_passphrase(secret)
    memory = 128 * _COST * _BLOCKS
    stretched = hashlib.scrypt(
        secret.encode("utf-8"), salt=_SALT, n=_COST, r=_BLOCKS, p=1, maxmem=2 * memory, dklen=32
    )
    return NoiseKey.from_bytes(stretched)
