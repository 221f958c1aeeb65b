"""Secrets and key material: not in reprs, errors, tracebacks with locals, or memory after use."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import age_reference as age
import diffveil
from diffveil import DiffveilError, RecoveryKey, generate_identity, keyfile, keys, keyschema, reseal
from diffveil.keysecrets import Secret
from diffveil.noise import NoiseKey
from key_samples import make_key

PASSPHRASE = "zebra quartz umbrella"
PACKAGE = str(Path(diffveil.__file__).parent)


@pytest.fixture
def key(rng: np.random.Generator) -> RecoveryKey:
    return make_key(rng)


@pytest.fixture(scope="module")
def pair() -> tuple[str, str]:
    return generate_identity()


def shown(error: BaseException) -> str:
    """All that a reporter of errors can say: the whole chain, with our frames' local variables."""
    text = []
    chain: BaseException | None = error
    while chain is not None:
        trace = traceback.TracebackException.from_exception(chain, capture_locals=True)
        ours = [frame for frame in trace.stack if frame.filename.startswith(PACKAGE)]
        text += [f"{frame.name} {frame.line} {frame.locals}" for frame in ours]
        text += [repr(chain), repr(chain.args), repr(vars(chain))]
        chain = chain.__context__
    return "\n".join(text)


def test_no_local_variable_of_a_traceback_holds_a_secret(
    key: RecoveryKey,
    pair: tuple[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    recipient, identity = pair
    token = identity.removeprefix("AGE-SECRET-KEY-1")
    path = tmp_path / "k.veilkey"
    key.seal(path, recipients=[recipient])
    sealed = path.read_bytes()
    by_passphrase = age.seal_scrypt(b"x", "another")
    identities = tmp_path / "id"
    identities.write_text(f"{identity}\nAGE-SECRET-KEY-1{token[:-1]}\n")
    full = tmp_path / "none" / "k"
    attempts: list[Callable[[], object]] = [
        lambda: key.seal_bytes(recipients=[identity]),
        lambda: key.seal_bytes(passphrase=PASSPHRASE, recipients=[recipient]),
        lambda: key.seal_bytes(passphrase=PASSPHRASE + "\0"),
        lambda: key.seal_bytes(passphrase=PASSPHRASE[:7]),
        lambda: key.seal_bytes(passphrase=PASSPHRASE.encode()),  # type: ignore[arg-type]
        lambda: key.seal_bytes(recipients=[identity.encode()]),  # type: ignore[list-item]
        lambda: key.seal(full, recipients=[recipient]),
        lambda: RecoveryKey.unseal(sealed[:-1], identity=identity),
        lambda: RecoveryKey.unseal(sealed[:50], identity=identity),
        lambda: RecoveryKey.unseal(sealed, identity=identities),
        lambda: RecoveryKey.unseal(sealed, identity=identity[:-1]),
        lambda: RecoveryKey.unseal(sealed, identity=token),
        lambda: RecoveryKey.unseal(sealed, passphrase=PASSPHRASE),
        lambda: RecoveryKey.unseal(sealed, passphrase=PASSPHRASE, identity=identity),
        lambda: RecoveryKey.unseal(by_passphrase, passphrase=PASSPHRASE),
        lambda: RecoveryKey.unseal(by_passphrase, passphrase=PASSPHRASE, max_work_factor=0),
        lambda: RecoveryKey.unseal(by_passphrase, identity=identity),
        lambda: RecoveryKey.unseal(full, passphrase=PASSPHRASE),
        lambda: reseal(path, identity=identity, new_passphrase=PASSPHRASE[:7]),
        lambda: reseal(path, identity=identity, new_passphrase=PASSPHRASE, add=[recipient]),
        lambda: reseal(path, identity=identity, recipients=[identity]),
        lambda: reseal(path, identity=identity, add=[identity]),
        lambda: reseal(path, identity=identity, remove=[identity]),
        lambda: reseal(path, passphrase=PASSPHRASE, new_passphrase=PASSPHRASE),
        lambda: reseal(full, passphrase=PASSPHRASE, recipients=[recipient]),
    ]
    for number, attempt in enumerate(attempts):
        with pytest.raises(DiffveilError) as caught:
            attempt()
        text = shown(caught.value)
        for secret in (PASSPHRASE[:7], token[:12], token[:12].lower()):
            assert secret not in text, f"attempt {number}"
    out, err = capfd.readouterr()
    for secret in (PASSPHRASE[:7], token[:12]):
        assert secret not in out + err + caplog.text


def test_secrets_do_not_print() -> None:
    secret = Secret.to_seal(PASSPHRASE, (), allow_weak=False)
    opening = Secret.to_open(None, "AGE-SECRET-KEY-1 nonsense")
    noise = NoiseKey.from_seed(0x1234567890ABCDEF)
    for thing in (secret, opening, noise):
        for text in (repr(thing), str(thing), f"{thing}", f"{[thing]}"):
            assert "redacted" in text
            assert "zebra" not in text
            assert "SECRET-KEY" not in text
    for thing in (secret, opening):
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(thing)


@pytest.mark.parametrize("kind", ["passphrase", "recipient"])
def test_plaintexts_are_wiped(
    key: RecoveryKey, pair: tuple[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytearray] = []

    def watched(call: Callable[..., bytearray]) -> Callable[..., bytearray]:
        def record(*args: Any, **options: Any) -> bytearray:
            memory = call(*args, **options)
            assert any(memory)
            seen.append(memory)
            return memory

        return record

    monkeypatch.setattr(keys, "write_key", watched(keys.write_key))
    monkeypatch.setattr(keys, "open_sealed", watched(keys.open_sealed))
    sealed = key.seal_bytes(recipients=[pair[0]])
    assert RecoveryKey.unseal(sealed, identity=pair[1]) == key
    if kind == "passphrase":
        sealed = age.seal_scrypt(bytes(keyschema.write_key(key)), PASSPHRASE)
        assert RecoveryKey.unseal(sealed, passphrase=PASSPHRASE) == key
    assert len(seen) >= 4
    for memory in seen:
        assert isinstance(memory, bytearray)
        assert memory
        assert not any(memory)


def test_what_was_decrypted_before_damage_is_wiped(
    key: RecoveryKey, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffveil import keysecrets

    made: list[Any] = []

    class Watched(keysecrets.Sink):
        def __init__(self, capacity: int) -> None:
            super().__init__(capacity)
            made.append(self)

    latents = np.ones((2, 4, 64, 64), np.float32)
    faces = (dataclasses.replace(key.faces[0], latents=latents),)
    sealed = dataclasses.replace(key, faces=faces).seal_bytes(recipients=[pair[0]])
    monkeypatch.setattr(keysecrets, "Sink", Watched)
    with pytest.raises(diffveil.KeyFileError):
        RecoveryKey.unseal(sealed[:-1] + bytes([sealed[-1] ^ 1]), identity=pair[1])
    (sink,) = made
    assert sink._size  # age gives out each chunk as it is authenticated, before the last one is
    assert not any(sink._buffer)


def test_a_payload_that_is_refused_is_wiped_too(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyrage

    seen: list[bytearray] = []
    original = keyfile.open_sealed

    def record(*args: Any, **options: Any) -> bytearray:
        seen.append(original(*args, **options))
        return seen[-1]

    monkeypatch.setattr(keys, "open_sealed", record)
    recipient = pyrage.x25519.Recipient.from_str(pair[0])
    with pytest.raises(diffveil.KeyFileError):
        RecoveryKey.unseal(pyrage.encrypt(b"not a key", [recipient]), identity=pair[1])
    assert seen == [bytearray(9)]


def test_a_key_can_be_wiped(key: RecoveryKey) -> None:
    part = key.select([1])
    with key as same:
        assert same is key
        assert np.any(part.faces[0].latents)
    for face in (*key.faces, *part.faces):
        for array in (face.tokens, face.latents, face.landmarks):
            assert not np.any(array)
            assert not array.flags.writeable
    with pytest.raises(diffveil.OptionError, match="wiped"):
        key.seal_bytes(recipients=[generate_identity()[0]])


def test_comparisons_of_secrets_take_the_same_time(
    key: RecoveryKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By construction: each goes through `hmac.compare_digest`, which is seen to be called."""
    import hmac

    calls: list[int] = []
    original = hmac.compare_digest

    def compare(a: Any, b: Any) -> bool:
        calls.append(len(a))
        return original(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert key == make_key(np.random.default_rng(20))
    assert key.faces[0] != key.faces[0].__class__(
        key.faces[0].tokens, key.faces[0].latents, np.eye(2, 3), (0, 0, 1, 1), np.eye(5, 2)
    )
    assert len(calls) == 2
