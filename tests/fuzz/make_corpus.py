"""Writes the hand-made seeds of the corpus: one valid input and a few near misses a target.

    PYTHONPATH=tests python tests/fuzz/make_corpus.py

Needs PyTorch, for files of `torch.save`. Files that the fuzzer added are left alone.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from targets import IDENTITY, PASSPHRASE  # noqa: E402

import age_reference as age  # noqa: E402
from diffveil.keyschema import write_key  # noqa: E402
from key_samples import make_face, make_key  # noqa: E402


def _seal_x25519(payload: bytes) -> bytes:
    """A file for IDENTITY, always the same."""
    nine = (9).to_bytes(32, "little")
    public = age.x25519(age.bech32_bytes(IDENTITY), nine)
    ephemeral, file_key = bytes(range(32)), bytes(range(100, 116))
    share = age.x25519(ephemeral, nine)
    shared = age.x25519(ephemeral, public)
    wrap = age.hkdf(shared, share + public, b"age-encryption.org/v1/X25519")
    body = age.b64(age.encrypt(wrap, bytes(12), file_key))
    return age.assemble(file_key, f"-> X25519 {age.b64(share)}\n{body}\n", payload)


def _saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def main() -> None:
    """Write the seeds."""
    rng = np.random.default_rng(1)

    def face(number: int, *width: int) -> object:
        tokens = rng.standard_normal((10, *width)).astype(np.float16)
        latents = rng.standard_normal((1, 1, 2, 2)).astype(np.float32)
        return make_face(rng, tokens=tokens, latents=latents, number=number)

    one = make_key(rng, faces=(face(0, 1),), sampler="ddim")
    two = make_key(rng, faces=(face(2, 1), face(1, 1)), sampler="ddim", steps=1)
    expanded = make_key(rng, faces=(face(0, 2, 1),), sampler="ddim")
    payload = bytes(write_key(one))
    tensors = [torch.zeros(1, 2, 1), torch.ones(1, 2, 1)]
    seeds = {
        "payload": b"\0" + payload,
        "header": b"\4" + payload[8 : 8 + int.from_bytes(payload[:8], "little")],
        "payload-two-faces": b"\0" + bytes(write_key(two)),
        "payload-expanded": b"\0" + bytes(write_key(expanded, [f"age1{'q' * 58}"])),
        "file-passphrase": b"\1" + age.seal_scrypt(payload, PASSPHRASE),
        "file-recipient": b"\1" + _seal_x25519(payload),
        "file-diary": b"\1" + age.seal_scrypt(b"Dear diary", PASSPHRASE),
        "tensors-list": b"\2" + _saved(tensors),
        "tensors-one": b"\2" + _saved(torch.zeros(1, 1, 2, 2, dtype=torch.float16)),
        "tensors-dict": b"\2" + _saved({"a": torch.zeros(2)}),
        "identity": b"\3" + f"# mine\n{IDENTITY}\n".encode(),
    }
    for name, data in seeds.items():
        (FOLDER / "corpus" / name).write_bytes(data)


if __name__ == "__main__":
    main()
