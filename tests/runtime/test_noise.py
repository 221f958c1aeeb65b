from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffveil.errors import OptionError
from diffveil.noise import NoiseKey, chacha20_keystream, normal

GOLDEN = Path(__file__).parents[1] / "golden" / "noise.txt"


def golden_records() -> list[dict[str, str]]:
    records = GOLDEN.read_text(encoding="utf-8").split("\n\n")[1:]
    return [dict(line.split(":", 1) for line in record.strip().split("\n")) for record in records]


@pytest.mark.parametrize("record", golden_records(), ids=lambda record: record["label"].strip())
def test_noise_is_golden(record: dict[str, str]) -> None:
    key = NoiseKey.from_seed(int(record["seed"]))
    key = key.derive(record["label"].strip(), *map(int, record["indices"].split()))
    assert normal(key, (40,)).astype("<f4").tobytes().hex() == record["expect"].strip()


def test_golden_file_is_not_empty() -> None:
    assert len(golden_records()) == 4


# RFC 8439, sections 2.4.2 (its keystream) and A.1, test vectors 1, 2, 3 and 5.
@pytest.mark.parametrize(
    ("key", "nonce", "counter", "start"),
    [
        (
            bytes(range(32)),
            "000000000000004a00000000",
            1,
            "224f51f3401bd9e12fde276fb8631ded8c131f82",
        ),
        (
            bytes(32),
            "00" * 12,
            0,
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7",
        ),
        (
            bytes(32),
            "00" * 12,
            1,
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed",
        ),
        (
            bytes(31) + b"\x01",
            "00" * 12,
            1,
            "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a",
        ),
        (
            bytes(32),
            "00" * 11 + "02",
            0,
            "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7",
        ),
    ],
)
def test_keystream_is_that_of_rfc_8439(key: bytes, nonce: str, counter: int, start: str) -> None:
    expected = bytes.fromhex(start)
    stream = chacha20_keystream(key, 200, nonce=bytes.fromhex(nonce), counter=counter)
    assert stream[: len(expected)] == expected


@given(length=st.integers(0, 400), blocks=st.integers(0, 5))
@settings(deadline=None)  # the machine may be busy
def test_keystream_blocks_follow_each_other(length: int, blocks: int) -> None:
    key = bytes(range(32))
    whole = chacha20_keystream(key, 64 * blocks + length)
    assert len(whole) == 64 * blocks + length
    assert chacha20_keystream(key, length, counter=blocks) == whole[64 * blocks :]


def test_keystream_refuses_what_it_cannot_give() -> None:
    last = chacha20_keystream(bytes(32), 64, counter=2**32 - 1)
    assert len(last) == 64
    with pytest.raises(OptionError, match="blocks"):
        chacha20_keystream(bytes(32), 65, counter=2**32 - 1)
    with pytest.raises(OptionError, match="blocks"):
        chacha20_keystream(bytes(32), -1)
    with pytest.raises(OptionError, match="key of 32 bytes"):
        chacha20_keystream(bytes(31), 1)
    with pytest.raises(OptionError, match="nonce of 12 bytes"):
        chacha20_keystream(bytes(32), 1, nonce=bytes(8))


def test_normal_is_gaussian() -> None:
    n = 200_000
    values = np.sort(normal(NoiseKey.from_seed(3).derive("statistics"), (n,)).astype(np.float64))
    # Each within five standard errors.
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((values**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / n)
    # Kolmogorov and Smirnov at about one in a million.
    expected = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in values[::50]])
    assert np.abs(expected - (np.arange(0, n, 50) + 0.5) / n).max() < 2.7 / math.sqrt(n)


def test_normal_values_are_uncorrelated() -> None:
    n = 100_000
    key = NoiseKey.from_seed(4)
    a = normal(key.derive("face", 0), (n,)).astype(np.float64)
    b = normal(key.derive("face", 1), (n,)).astype(np.float64)
    for first, second in (
        (a, b),
        (a[:-1], a[1:]),
        (a[:-2], a[2:]),
        (a**2, b**2),
        (a[::2], a[1::2]),
    ):
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(len(first))


def test_normal_agrees_with_numpys_functions() -> None:
    """Box–Muller by NumPy's own logarithm, cosine and sine, to two units of float32."""
    from diffveil.noise import _log, _unit_circle

    words = np.concatenate(
        [
            np.array([0, 1, 2**29, 2**30 - 1, 2**30, 2**31, 3 * 2**30, 2**32 - 1], dtype=np.uint32),
            np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32),
        ]
    )
    u = (words.astype(np.float64) + 0.5) * 2.0**-32
    np.testing.assert_allclose(_log(u), np.log(u), rtol=4e-16, atol=1e-16)
    cosine, sine = _unit_circle(words)
    angle = (words.astype(np.float64) + 0.5) * (math.pi * 2.0**-31) - math.pi / 4
    np.testing.assert_allclose(cosine, np.cos(angle), rtol=0, atol=2e-15)
    np.testing.assert_allclose(sine, np.sin(angle), rtol=0, atol=2e-15)
    np.testing.assert_allclose(np.hypot(cosine, sine), 1.0, rtol=4e-16)


@given(shape=st.lists(st.integers(0, 5), max_size=4), longer=st.integers(0, 50))
@settings(deadline=None)  # the machine may be busy
def test_a_short_draw_begins_a_longer_one(shape: list[int], longer: int) -> None:
    key = NoiseKey.from_seed(9).derive("prefix")
    short = normal(key, shape)
    assert short.shape == tuple(shape)
    assert short.dtype == np.float32
    assert np.isfinite(short).all()
    count = math.prod(shape)
    np.testing.assert_array_equal(short.reshape(-1), normal(key, (count + longer,))[:count])


def test_noise_does_not_depend_on_the_order_of_draws() -> None:
    root = NoiseKey.from_seed(5)
    forward = {i: normal(root.derive("face", i), (2, 4)) for i in range(4)}
    backward = {i: normal(NoiseKey.from_seed(5).derive("face", i), (2, 4)) for i in (3, 1, 2, 0)}
    for i, values in forward.items():
        np.testing.assert_array_equal(values, backward[i])
    assert len({values.tobytes() for values in forward.values()}) == 4


def test_normal_refuses_negative_axes() -> None:
    with pytest.raises(OptionError, match="shape"):
        normal(NoiseKey.from_seed(0), (2, -1))


purposes = st.tuples(
    st.text(min_size=1, max_size=5), st.lists(st.integers(0, 2**256 - 1), max_size=3)
)


@given(purposes, purposes)
@settings(deadline=None)
def test_purposes_never_share_a_key(one: tuple[str, list[int]], two: tuple[str, list[int]]) -> None:
    root = NoiseKey.from_seed(1)
    same = root.derive(one[0], *one[1]) == root.derive(two[0], *two[1])
    assert same == (one == two)


def test_keys_of_different_origin_differ() -> None:
    material = (5).to_bytes(32, "big")
    keys = [
        NoiseKey.from_seed(5),
        NoiseKey.from_bytes(material),
        NoiseKey.from_seed(5).derive("a"),
        NoiseKey.from_seed(5).derive("a", 0),
        NoiseKey.from_seed(5).derive("a").derive("a"),
        NoiseKey.random(),
        NoiseKey.random(),
    ]
    assert len(set(keys)) == len(keys)
    assert NoiseKey.from_bytes(material) == NoiseKey.from_bytes(material)
    assert NoiseKey.from_seed(5) != 5


@pytest.mark.parametrize("seed", [-1, 2**256])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(OptionError, match="seed is out of range"):
        NoiseKey.from_seed(seed)
    with pytest.raises(OptionError, match="index of 'a' is out of range"):
        NoiseKey.from_seed(0).derive("a", seed)


def test_malformed_keys_are_refused() -> None:
    with pytest.raises(TypeError):
        NoiseKey.from_seed(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="from_seed"):
        NoiseKey()
    with pytest.raises(OptionError, match="32 bytes, received 31"):
        NoiseKey.from_bytes(bytes(31))
    with pytest.raises(OptionError, match="label"):
        NoiseKey.from_seed(0).derive("")


def test_a_key_is_opaque() -> None:
    material = bytes(range(100, 132))
    key = NoiseKey.from_bytes(material)
    for text in (repr(key), str(key), f"{key}", repr([key])):
        assert "redacted" in text
        assert material.hex() not in text
    with pytest.raises(TypeError, match="pickled or copied"):
        pickle.dumps(key)
    with pytest.raises(TypeError, match="pickled or copied"):
        copy.deepcopy(key)
    with pytest.raises(AttributeError, match="cannot be changed"):
        key._material = bytes(32)
    with pytest.raises(AttributeError, match="cannot be changed"):
        del key._material
    anything: Any = key
    for operation in (
        lambda: anything + 1,
        lambda: anything[0],
        lambda: iter(anything),
        lambda: bytes(anything),
    ):
        with pytest.raises(TypeError):
            operation()
