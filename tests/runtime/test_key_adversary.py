"""Keys under attack as a whole: a documented error, bounded memory, and never another key."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable

import numpy as np
import pyrage
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import age_reference as age
from diffveil import KeyFileError, RecoveryKey, WrongSecretError, generate_identity
from diffveil.keyschema import read_key, write_key
from key_samples import make_face, make_key

PASSPHRASE = "correct horse battery staple"
PAIR = generate_identity()
_EDITS = st.lists(
    st.tuples(st.integers(0, 10_000), st.integers(0, 3), st.binary(min_size=1, max_size=40)),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def key() -> RecoveryKey:
    return make_key(np.random.default_rng(8))


@pytest.fixture(scope="module")
def plain(key: RecoveryKey) -> bytes:
    return bytes(write_key(key))


@pytest.fixture(scope="module")
def sealed(plain: bytes) -> bytes:
    return age.seal_scrypt(plain, PASSPHRASE)


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Overwrite, insert, delete, cut off."""
    out = bytearray(data)
    for place, kind, text in edits:
        at = place % (len(out) + 1)
        if kind == 0:
            out[at : at + len(text)] = text
        elif kind == 1:
            out[at:at] = text
        elif kind == 2:
            del out[at : at + len(text)]
        else:
            del out[at:]
    return bytes(out)


@settings(max_examples=300, deadline=None)
@given(edits=_EDITS)
def test_no_edit_of_a_sealed_file_goes_unnoticed(
    key: RecoveryKey, sealed: bytes, edits: list[tuple[int, int, bytes]]
) -> None:
    data = edited(sealed, edits)
    try:
        opened = RecoveryKey.unseal(data, passphrase=PASSPHRASE, max_work_factor=8)
    except KeyFileError:
        assert data != sealed
    else:
        assert data == sealed
        assert opened == key


@settings(max_examples=300, deadline=None)
@given(edits=_EDITS)
def test_an_edited_payload_is_refused_or_a_key(
    plain: bytes, edits: list[tuple[int, int, bytes]]
) -> None:
    # Whoever has a public key can seal anything to it: here nothing is authenticated.
    sealed = pyrage.encrypt(edited(plain, edits), [pyrage.x25519.Recipient.from_str(PAIR[0])])
    problem: KeyFileError | None = None
    try:
        opened = RecoveryKey.unseal(sealed, identity=PAIR[1])
    except KeyFileError as error:
        problem = error
    if problem is None:
        assert RecoveryKey(**read_key(write_key(opened, opened.recipients))) == opened
    else:
        assert not isinstance(problem, WrongSecretError)
        assert str(problem).isprintable()


def _header(change: Callable[[dict[str, object]], None], plain: bytes) -> bytes:
    length = int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + plain[8 + length :]


@pytest.mark.parametrize(
    "shape",
    [
        [1 << 20, 2, 4, 4, 4],
        [2, 2, 1 << 20, 4, 4],
        [2**62, 2, 2, 2, 2],
        [2, 2, 4, 1024, 1024],
        [1, 1, 1, 1, 1],
    ],
)
def test_oversized_shapes_cost_no_memory(plain: bytes, shape: list[int]) -> None:
    def claim(header: dict[str, object]) -> None:
        entry = header["latents"]
        assert isinstance(entry, dict)
        entry["shape"] = shape

    data = age.seal_scrypt(_header(claim, plain), PASSPHRASE)
    RecoveryKey.unseal(age.seal_scrypt(plain, PASSPHRASE), passphrase=PASSPHRASE)  # warm up
    tracemalloc.start()
    try:
        with pytest.raises(KeyFileError):
            RecoveryKey.unseal(data, passphrase=PASSPHRASE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * len(data)


def test_many_faces_and_pictures_stay_within_their_limits() -> None:
    rng = np.random.default_rng(9)
    small = {
        "tokens": np.zeros((10, 1), np.float16),
        "latents": np.ones((1, 1, 1, 1), np.float16),
    }
    face = make_face(rng, **small)
    faces = tuple(
        type(face)(face.tokens, face.latents, face.matrix, face.box, face.landmarks, number)
        for number in range(1024)
    )
    pictures = make_key(rng).pictures
    many = tuple(type(pictures[0])(number.to_bytes(32, "big"), bytes(192)) for number in range(256))
    key = make_key(rng, faces=faces, pictures=many, sampler="ddim")
    recipient, identity = generate_identity()
    others = [generate_identity()[0] for _ in range(127)]
    sealed = key.seal_bytes(recipients=[*others, recipient])
    opened = RecoveryKey.unseal(sealed, identity=identity)
    assert opened == key
    assert opened.recipients == (*others, recipient)
