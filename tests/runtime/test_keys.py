"""Recovery keys as objects, and their way through a sealed file and back."""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import os
import pickle
import stat
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import age_reference as age
from diffveil.errors import KeyFileError, OptionError, WrongSecretError
from diffveil.keys import RecoveryKey, generate_identity, inspect_keyfile
from key_samples import make_face, make_key

PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2718)


@pytest.fixture
def key(rng: np.random.Generator) -> RecoveryKey:
    return make_key(rng)


@pytest.fixture(scope="module")
def pair() -> tuple[str, str]:
    return generate_identity()


def assert_same(actual: RecoveryKey, expected: RecoveryKey) -> None:
    """Compare field by field, bit by bit: independent of the product's own comparison."""
    for field in ("bundle", "sampler", "steps", "photo_size", "pictures", "backend", "precision"):
        assert getattr(actual, field) == getattr(expected, field)
    assert len(actual.faces) == len(expected.faces)
    for ours, theirs in zip(actual.faces, expected.faces, strict=True):
        assert ours.box == theirs.box
        assert ours.number == theirs.number
        for name in ("tokens", "latents", "matrix", "landmarks"):
            left, right = getattr(ours, name), getattr(theirs, name)
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


# ---- round trips


def test_a_passphrase_seals_and_unseals(key: RecoveryKey, tmp_path: Path) -> None:
    # The one test that pays for real scrypt; all others use recipients or a tiny work factor.
    path = tmp_path / "photo.veilkey"
    key.seal(path, passphrase=PASSPHRASE)
    assert_same(RecoveryKey.unseal(path, passphrase=PASSPHRASE), key)
    facts = inspect_keyfile(path)
    assert facts["sealed_to"] == "passphrase"
    factor = facts["scrypt_work_factor"]
    assert isinstance(factor, int)
    assert (
        factor >= 15
    )  # OWASP's floor for scrypt is 2^17 at one pass; pyrage adapts to the machine


def test_any_of_several_recipients_unseals(key: RecoveryKey) -> None:
    pairs = [generate_identity() for _ in range(3)]
    sealed = key.seal_bytes(recipients=[recipient for recipient, _ in pairs])
    for _, identity in pairs:
        assert_same(RecoveryKey.unseal(sealed, identity=identity), key)


def test_an_identity_may_be_a_file_with_comments(
    key: RecoveryKey, pair: tuple[str, str], tmp_path: Path
) -> None:
    recipient, identity = pair
    file = tmp_path / "me.txt"
    file.write_text(f"# created: today\n# public key: {recipient}\n\n{identity}\n", "utf-8")
    sealed = key.seal_bytes(recipients=(recipient,))
    assert_same(RecoveryKey.unseal(sealed, identity=file), key)
    assert_same(RecoveryKey.unseal(sealed, identity=str(file)), key)
    both = f"{generate_identity()[1]}\n{identity}"
    assert_same(RecoveryKey.unseal(sealed, identity=both), key)


def test_an_independent_age_and_safetensors_read_what_was_sealed(
    key: RecoveryKey, pair: tuple[str, str]
) -> None:
    recipient, identity = pair
    plain = age.open_x25519(key.seal_bytes(recipients=[recipient]), identity)
    tensors = safetensors.numpy.load(plain)
    assert sorted(tensors) == [
        "boxes",
        "landmarks",
        "latents",
        "matrices",
        "numbers",
        "picture_colours",
        "picture_digests",
        "tokens",
    ]
    np.testing.assert_array_equal(tensors["tokens"], np.stack([f.tokens for f in key.faces]))
    np.testing.assert_array_equal(tensors["latents"], np.stack([f.latents for f in key.faces]))
    np.testing.assert_array_equal(tensors["boxes"], np.array([f.box for f in key.faces]))


def test_an_independent_age_can_write_what_is_unsealed(key: RecoveryKey) -> None:
    recipient, identity = generate_identity()
    plain = age.open_x25519(key.seal_bytes(recipients=[recipient]), identity)
    assert_same(RecoveryKey.unseal(age.seal_scrypt(plain, "short"), passphrase="short"), key)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    faces=st.integers(1, 5),
    width=st.integers(1, 40),
    channels=st.integers(1, 8),
    side=st.integers(1, 9),
    dtype=st.sampled_from([np.float16, np.float32]),
    sampler=st.sampled_from(["ddim", "o-belm"]),
    steps=st.integers(1, 1000),
    size=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
)
def test_every_valid_key_survives_sealing(
    pair: tuple[str, str],
    seed: int,
    faces: int,
    width: int,
    channels: int,
    side: int,
    dtype: type[np.floating],
    sampler: str,
    steps: int,
    size: tuple[int, int],
) -> None:
    rng = np.random.default_rng(seed)
    count = {"ddim": 1, "o-belm": 2}[sampler]
    key = make_key(
        rng,
        faces=tuple(
            make_face(
                rng,
                number=number,
                tokens=rng.standard_normal((10, width)).astype(dtype),
                latents=rng.standard_normal((count, channels, side, side)).astype(dtype),
            )
            for number in range(faces)
        ),
        sampler=sampler,
        steps=steps,
        photo_size=size,
    )
    sealed = key.seal_bytes(recipients=[pair[0]])
    assert_same(RecoveryKey.unseal(sealed, identity=pair[1]), key)


def test_sealing_twice_gives_different_bytes(key: RecoveryKey, pair: tuple[str, str]) -> None:
    # A fresh file key and nonce each time: equal keys must not be recognisable as equal.
    assert key.seal_bytes(recipients=[pair[0]]) != key.seal_bytes(recipients=[pair[0]])


# ---- wrong secrets


def test_another_identity_is_a_wrong_secret(key: RecoveryKey, pair: tuple[str, str]) -> None:
    sealed = key.seal_bytes(recipients=[pair[0]])
    with pytest.raises(WrongSecretError, match="identity does not open"):
        RecoveryKey.unseal(sealed, identity=generate_identity()[1])


def test_another_passphrase_is_a_wrong_secret() -> None:
    sealed = age.seal_scrypt(b"whatever", PASSPHRASE)
    for wrong in (PASSPHRASE + " ", PASSPHRASE[:-1], PASSPHRASE.upper(), "x"):
        with pytest.raises(WrongSecretError, match="passphrase does not open"):
            RecoveryKey.unseal(sealed, passphrase=wrong)


def test_the_other_kind_of_secret_is_a_wrong_secret(
    key: RecoveryKey, pair: tuple[str, str]
) -> None:
    with pytest.raises(WrongSecretError, match="sealed to recipients"):
        RecoveryKey.unseal(key.seal_bytes(recipients=[pair[0]]), passphrase=PASSPHRASE)
    with pytest.raises(WrongSecretError, match="sealed to a passphrase"):
        RecoveryKey.unseal(age.seal_scrypt(b"", PASSPHRASE), identity=pair[1])


def test_exactly_one_secret_must_be_given(key: RecoveryKey, pair: tuple[str, str]) -> None:
    recipient, identity = pair
    sealed = key.seal_bytes(recipients=[recipient])
    with pytest.raises(OptionError, match="not both"):
        RecoveryKey.unseal(sealed, passphrase=PASSPHRASE, identity=identity)
    with pytest.raises(OptionError, match="Give a passphrase or an identity"):
        RecoveryKey.unseal(sealed)
    with pytest.raises(OptionError, match="not to both"):
        key.seal_bytes(passphrase=PASSPHRASE, recipients=[recipient])
    with pytest.raises(OptionError, match="Nothing to seal to"):
        key.seal_bytes()
    with pytest.raises(OptionError, match="not one string"):
        key.seal_bytes(recipients=recipient)


@pytest.mark.parametrize(
    ("passphrase", "match"),
    [
        ("", "empty"),
        ("            ", "empty"),
        ("seven77", "fewer than 8 characters"),
        ("abababababababab", "fewer than 4 different"),
        ("x" * 1025, "at most 1024 bytes"),
        ("a lone surrogate \ud800", "UTF-8"),
        ("a nul inside it \0", "NUL"),
    ],
)
def test_unfit_passphrases_are_refused(key: RecoveryKey, passphrase: str, match: str) -> None:
    with pytest.raises(OptionError, match=match) as caught:
        key.seal_bytes(passphrase=passphrase)
    # Neither the error nor one that it was raised from may carry the text.
    assert caught.value.__context__ is None
    if passphrase.strip():
        assert passphrase not in str(caught.value)


def test_weak_passphrases_can_be_allowed_but_not_empty_ones(
    key: RecoveryKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyrage

    seen: list[str] = []

    def encrypt(_: bytes, passphrase: str) -> bytes:
        seen.append(passphrase)
        return b"sealed"

    monkeypatch.setattr(pyrage.passphrase, "encrypt", encrypt)
    assert key.seal_bytes(passphrase="weak", allow_weak_passphrase=True) == b"sealed"
    assert seen == ["weak"]
    with pytest.raises(OptionError, match="empty"):
        key.seal_bytes(passphrase=" ", allow_weak_passphrase=True)


# ---- nothing is shown


def test_keys_never_print(key: RecoveryKey) -> None:
    for thing in (key, key.faces[0]):
        for text in (repr(thing), str(thing), f"{thing}", f"{[thing]}"):
            assert "redacted" in text
            assert key.bundle not in text
            assert not any(character in text for character in ".{")  # no number with a fraction


def test_keys_do_not_pickle_and_do_not_hash(key: RecoveryKey) -> None:
    for thing in (key, key.faces[0]):
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(thing)
        with pytest.raises(TypeError, match="unhashable"):
            hash(thing)
        assert copy.copy(thing) is thing
        assert copy.deepcopy(thing) is thing


def test_no_error_text_holds_a_secret(
    key: RecoveryKey,
    pair: tuple[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    recipient, identity = pair
    secret = identity.removeprefix("AGE-SECRET-KEY-1")
    sealed = key.seal_bytes(recipients=[recipient])
    by_passphrase = age.seal_scrypt(b"x", PASSPHRASE)
    damaged = bytearray(sealed)
    damaged[-1] ^= 1
    file = tmp_path / "identity"
    file.write_text(f"{identity}\nnot a key but {secret}\n")
    attempts: list[Callable[[], object]] = [
        lambda: key.seal_bytes(recipients=[identity]),
        lambda: key.seal_bytes(recipients=[secret]),
        lambda: key.seal_bytes(passphrase=secret[:7]),
        lambda: RecoveryKey.unseal(bytes(damaged), identity=identity),
        lambda: RecoveryKey.unseal(sealed, identity=f"AGE-SECRET-KEY-1{secret}X"),
        lambda: RecoveryKey.unseal(sealed, identity=identity.lower() + "x"),
        lambda: RecoveryKey.unseal(sealed, identity=f"AGE-SECRETKEY-1{secret}"),  # a "path"
        lambda: RecoveryKey.unseal(sealed, identity=file),
        lambda: RecoveryKey.unseal(by_passphrase, identity=identity),
        lambda: RecoveryKey.unseal(by_passphrase, passphrase=secret),
        lambda: RecoveryKey.unseal(sealed, passphrase=secret),
        lambda: RecoveryKey.unseal(sealed, passphrase=secret + "\ud800"),
        lambda: RecoveryKey.unseal(sealed, passphrase=PASSPHRASE, identity=identity),
    ]
    for attempt in attempts:
        with pytest.raises((OptionError, KeyFileError)) as caught:
            attempt()
        error: BaseException | None = caught.value
        while error is not None:  # the whole chain, with attributes such as UnicodeError.object
            shown = io.StringIO()
            traceback.print_exception(error, file=shown)
            lines = [line for line in shown.getvalue().splitlines() if "lambda" not in line]
            text = "\n".join((*lines, repr(error), repr(vars(error)), repr(error.args)))
            assert secret[:11] not in text
            assert secret[:11].lower() not in text
            error = error.__context__
    out, err = capfd.readouterr()
    assert secret[:11] not in out + err + caplog.text


# ---- the objects


def test_arrays_are_copied_and_read_only(rng: np.random.Generator) -> None:
    tokens = rng.standard_normal((10, 8)).astype(np.float32)
    face = make_face(rng, tokens=tokens)
    before = face.tokens.copy()
    tokens[:] = 0
    np.testing.assert_array_equal(face.tokens, before)
    for array in (face.tokens, face.latents, face.matrix, face.landmarks):
        with pytest.raises(ValueError, match="read-only"):
            array.flat[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        face.box = (0, 0, 1, 1)  # type: ignore[misc]


def test_equality_is_by_content(rng: np.random.Generator) -> None:
    face = make_face(rng)
    assert face == dataclasses.replace(face)
    assert face != dataclasses.replace(face, tokens=face.tokens.astype(np.float32))
    latents = face.latents.copy()
    latents.flat[-1] = np.nextafter(latents.flat[-1], np.float32(9))
    assert face != dataclasses.replace(face, latents=latents)
    assert face != "face"
    key = make_key(rng)
    assert key == dataclasses.replace(key)
    assert key != dataclasses.replace(key, steps=9)
    assert key != dataclasses.replace(key, faces=key.faces[::-1])
    assert key != "key"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokens": np.zeros((9, 8), np.float32)}, r"tokens must be \[10, any\], not \[9, 8\]"),
        ({"tokens": np.zeros((10, 0), np.float32)}, "tokens"),
        ({"tokens": np.zeros((10, 8))}, "tokens must be a floating-point"),
        ({"tokens": np.full((10, 8), np.nan, np.float16)}, "tokens must be finite"),
        ({"tokens": np.zeros((10, 5000), np.float16)}, "at most 4096 wide"),
        ({"latents": np.zeros((3, 4, 4, 4), np.float32)}, "latents"),
        ({"latents": np.zeros((2, 4, 4, 5), np.float32)}, "latents"),
        ({"latents": np.zeros((4, 4, 4), np.float32)}, "latents"),
        ({"latents": [[[[1.0]]]]}, "latents must be a floating-point"),
        ({"latents": np.full((2, 4, 4, 4), np.inf, np.float32)}, "latents must be finite"),
        ({"matrix": np.zeros((2, 3))}, "matrix must scale"),
        ({"matrix": [[1, 1, 0], [1, 1, 0]]}, "matrix must scale"),
        ({"matrix": [[1e6, 0, 0], [0, 1e-6, 0]]}, "matrix must scale"),
        ({"matrix": [[1, 0, 1e9], [0, 1, 0]]}, "stay within"),
        ({"matrix": np.eye(3)}, "matrix must be"),
        ({"box": (5, 0, 5, 1)}, "box must have x0 < x1"),
        ({"box": (0, 0, 1)}, "box must be"),
        ({"box": ("secret", 0, 1, 1)}, "box must be a floating-point"),
        ({"landmarks": np.full((5, 2), np.inf)}, "landmarks must be finite"),
        ({"landmarks": np.zeros((2, 5))}, "landmarks must be"),
    ],
)
def test_unfit_faces_are_refused(
    rng: np.random.Generator, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(OptionError, match=match) as caught:
        make_face(rng, **changes)
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"faces": ()}, "faces must number 1 to 1024"),
        ({"bundle": "AB" * 32}, "bundle"),
        ({"bundle": "ab"}, "bundle"),
        ({"sampler": "euler"}, "sampler must be one of bdia, ddim, o-belm"),
        ({"sampler": "ddim"}, "ddim leaves 1 latents a face, not 2"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"photo_size": (0, 10)}, "photo_size"),
        ({"photo_size": (10, 10, 3)}, "photo_size"),
        ({"backend": "no spaces"}, "backend"),
        ({"precision": ""}, "precision"),
        ({"pictures": ()}, "pictures must number 1 to 256"),
        ({"recipients": ("age1x",)}, "recipients must be"),
    ],
)
def test_unfit_keys_are_refused(
    rng: np.random.Generator, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(OptionError, match=match):
        make_key(rng, **changes)


def test_all_problems_are_reported_at_once(rng: np.random.Generator) -> None:
    with pytest.raises(OptionError, match=r"bundle.*sampler.*steps.*photo_size.*backend"):
        make_key(rng, bundle="?", sampler="?", steps=0, photo_size=(0, 0), backend="?")
    with pytest.raises(OptionError, match=r"tokens.*matrix.*box"):
        make_face(rng, tokens=None, matrix=None, box=())


def test_faces_of_one_key_share_shapes(rng: np.random.Generator) -> None:
    other = make_face(rng, number=1, tokens=np.zeros((10, 7), np.float16))
    with pytest.raises(OptionError, match="same shapes"):
        make_key(rng, faces=(make_face(rng), other))


# ---- files


def test_the_file_is_private_and_nothing_else_is_left(
    key: RecoveryKey, pair: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "k.veilkey"
    path.write_bytes(b"old")
    path.chmod(0o644)
    mask = os.umask(0)
    try:
        key.seal(path, recipients=[pair[0]])
    finally:
        os.umask(mask)
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["k.veilkey"]
    assert_same(RecoveryKey.unseal(path, identity=pair[1]), key)
    assert_same(RecoveryKey.unseal(str(path), identity=pair[1]), key)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("error", "seen"), [(OSError(28, "No space left"), KeyFileError), (KeyboardInterrupt(), None)]
)
def test_an_interrupted_write_leaves_the_old_file(
    key: RecoveryKey,
    pair: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: BaseException,
    seen: type[BaseException] | None,
) -> None:
    path = tmp_path / "k.veilkey"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(seen or type(error)):
        key.seal(path, recipients=[pair[0]])
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["k.veilkey"]


def test_an_existing_key_can_be_kept(
    key: RecoveryKey, pair: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "k.veilkey"
    key.seal(path, recipients=[pair[0]], overwrite=False)
    before = path.read_bytes()
    with pytest.raises(OptionError, match="already exists"):
        key.seal(path, recipients=[pair[0]], overwrite=False)
    assert path.read_bytes() == before


def test_unusable_paths_are_key_file_errors(
    key: RecoveryKey, pair: tuple[str, str], tmp_path: Path
) -> None:
    for target in (tmp_path / "no folder" / "k", tmp_path, f"{tmp_path}/nul\0inside"):
        with pytest.raises(KeyFileError, match="Cannot write"):
            key.seal(target, recipients=[pair[0]])
    for source in (tmp_path / "absent", tmp_path, f"{tmp_path}/nul\0inside"):
        with pytest.raises(KeyFileError):
            RecoveryKey.unseal(source, identity=pair[1])
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting(pair: tuple[str, str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(KeyFileError, match="not a regular file"):
        RecoveryKey.unseal(tmp_path / "pipe", identity=pair[1])


def test_oversized_files_are_not_read(pair: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)  # sparse
    with pytest.raises(KeyFileError, match="larger than"):
        RecoveryKey.unseal(path, identity=pair[1])
    with pytest.raises(KeyFileError, match="larger than"):
        inspect_keyfile(path)
