"""`keyed_normal`, interpreted, against the CPU's noise and RFC 8439."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffveil.noise import NoiseKey, chacha20_keystream, normal
from diffveil_kernels.calls import keyed_normal_calls
from diffveil_kernels.errors import KernelInputError
from diffveil_kernels.jit import keyed_normal as source
from diffveil_kernels.jit import ops
from diffveil_kernels.reference import keyed_normal as reference

BLOCKS = 8


def device_stream(keys: list[bytes], blocks: int, counter: int, nonce: tuple[int, ...]) -> bytes:
    """Keystreams as the kernel computes them, one after the other."""
    words = torch.from_numpy(reference.key_words(keys).copy())
    out = torch.full((len(keys), 16 * blocks + 1), -1, dtype=torch.int32)[:, :-1].contiguous()
    grid = (len(keys), -(-blocks // BLOCKS), 1)
    signed = [word - 2**32 if word >= 2**31 else word for word in (counter, *nonce)]
    source.keystream[grid](words, out, blocks, *signed, BLOCKS=BLOCKS)
    return out.numpy().astype("<i4").tobytes()


# RFC 8439, section 2.4.2 (its keystream) and A.1, test vectors 1, 2, 3 and 5.
@pytest.mark.parametrize(
    ("key", "nonce", "counter", "start"),
    [
        (bytes(range(32)), "000000000000004a00000000", 1, "224f51f3401bd9e12fde276fb8631ded"),
        (bytes(32), "00" * 12, 0, "76b8e0ada0f13d90405d6ae55386bd28"),
        (bytes(32), "00" * 12, 1, "9f07e7be5551387a98ba977c732d080d"),
        (bytes(31) + b"\x01", "00" * 12, 1, "3aeb5224ecf849929b9d828db1ced4dd"),
        (bytes(32), "00" * 11 + "02", 0, "c2c64d378cd536374ae204b9ef933fcd"),
    ],
)
def test_keystream_is_that_of_rfc_8439(key: bytes, nonce: str, counter: int, start: str) -> None:
    words = tuple(np.frombuffer(bytes.fromhex(nonce), dtype="<u4").tolist())
    stream = device_stream([key], 2, counter, words)
    assert stream.startswith(bytes.fromhex(start))
    assert stream == chacha20_keystream(key, 128, nonce=bytes.fromhex(nonce), counter=counter)
    plain = reference.keystream(reference.key_words([key]), 2, counter=counter, nonce=words)
    assert plain.astype("<u4").tobytes() == stream


@given(
    keys=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=2),
    blocks=st.integers(1, BLOCKS + 1),
    counter=st.integers(0, 2**32 - 1 - BLOCKS),
    nonce=st.tuples(*[st.integers(0, 2**32 - 1)] * 3),
)
@settings(max_examples=4, deadline=None)  # interpreting is slow
def test_keystream_is_the_cpus_bit_for_bit(
    keys: list[bytes], blocks: int, counter: int, nonce: tuple[int, ...]
) -> None:
    raw = np.array(nonce, dtype="<u4").tobytes()
    expected = [chacha20_keystream(k, 64 * blocks, nonce=raw, counter=counter) for k in keys]
    assert device_stream(keys, blocks, counter, nonce) == b"".join(expected)


# Around a pair, a block of 16 numbers, and a program's 1024.
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (3, 15), (2, 1023), (1, 1025)])
def test_normals_are_the_cpus_bit_for_bit(rows: int, count: int) -> None:
    keys = [NoiseKey.from_seed(count).derive("diffveil/v1/step", face, 7) for face in range(rows)]
    words = reference.key_words([key._material for key in keys])
    expected = np.stack([normal(key, (count,)) for key in keys])
    actual = ops.keyed_normal(torch.from_numpy(words.copy()), count)
    assert actual.numpy().tobytes() == expected.tobytes()
    # The references take logarithm and circle from libraries: a unit in the last place is theirs.
    ulp = np.spacing(np.abs(expected))
    for plain in (
        reference.keyed_normal(words, count),
        reference.keyed_normal(torch.from_numpy(words.copy()), count).numpy(),
    ):
        assert plain.dtype == np.float32
        assert (np.abs(plain - expected) <= ulp).all()


def test_box_muller_is_the_cpus_at_the_ends_of_its_ranges() -> None:
    """Words at which the logarithm's and the circle's pieces meet, as no key would give them."""
    from diffveil.noise import _log, _unit_circle

    edges = [0, 1, 2, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 2, 2**32 - 1]
    half = int(0.7071067811865476 * 2**32)
    words = np.array([*edges, half, half + 1, half - 1, 3, 5], dtype=np.uint32)
    radius = np.sqrt(-2.0 * _log((words.astype(np.float64) + 0.5) * 2.0**-32))
    cosine, sine = _unit_circle(words[::-1])
    x, y = torch.empty(16), torch.empty(16)
    probe_box_muller(torch.from_numpy(words.view(np.int32).copy()), x, y)
    assert x.numpy().tobytes() == (radius * cosine).astype(np.float32).tobytes()
    assert y.numpy().tobytes() == (radius * sine).astype(np.float32).tobytes()


def probe_box_muller(words: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    from kernel_probes import box_muller

    box_muller[(1,)](words, x, y, COUNT=len(words))


def test_misfits_are_refused() -> None:
    keys = torch.zeros((2, 8), dtype=torch.int32)
    with pytest.raises(KernelInputError, match=r"keys: received torch\.int64"):
        ops.keyed_normal(keys.long(), 4)
    with pytest.raises(KernelInputError, match="not contiguous"):
        ops.keyed_normal(torch.zeros((8, 2), dtype=torch.int32).T, 4)
    with pytest.raises(KernelInputError, match="expected 32 bytes"):
        reference.key_words([bytes(31)])
    with pytest.raises(KernelInputError, match="too many for one launch"):
        keyed_normal_calls(0, 0, 1, 2**31)
    assert ops.keyed_normal(keys, 0).shape == (2, 0)
    assert ops.keyed_normal(keys[:0], 4).shape == (0, 4)
