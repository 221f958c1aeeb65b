"""The sealed file under attack: always a documented error, never other bytes, never much work."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import age_reference as age
from diffveil import keyschema
from diffveil.errors import (
    BackendUnavailableError,
    KeyFileError,
    OptionError,
    WrongSecretError,
)
from diffveil.keyfile import MAX_WORK_FACTOR, parse_header
from diffveil.keypayload import pack, unpack
from diffveil.keys import RecoveryKey, generate_identity, inspect_keyfile
from key_samples import make_key

PASSPHRASE = "correct horse battery staple"
FILE_KEY = bytes(16)
BODY = "A" * 43
X25519 = f"-> X25519 {'A' * 43}\n{BODY}\n"


@pytest.fixture(scope="module")
def pair() -> tuple[str, str]:
    return generate_identity()


@pytest.fixture(scope="module")
def key() -> RecoveryKey:
    return make_key(np.random.default_rng(31))


@pytest.fixture(scope="module")
def plain(key: RecoveryKey, pair: tuple[str, str]) -> bytes:
    return age.open_x25519(key.seal_bytes(recipients=[pair[0]]), pair[1])


@pytest.fixture(scope="module")
def sealed(plain: bytes) -> bytes:
    """A sound file whose passphrase takes no time."""
    return age.seal_scrypt(plain, PASSPHRASE)


def unseal(data: bytes) -> RecoveryKey:
    return RecoveryKey.unseal(data, passphrase=PASSPHRASE)


def file(stanzas: str) -> bytes:
    """A file with a valid MAC, as someone who knows the file key could make."""
    return age.assemble(FILE_KEY, stanzas, b"payload")


# ---- the oracle itself


def test_the_oracle_is_sound() -> None:
    # RFC 8439 section 2.4.2 (ChaCha20), RFC 7748 section 5.2 (X25519), RFC 5869 A.3 (HKDF).
    sunscreen = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it."
    )
    nonce = bytes.fromhex("000000000000004a00000000")
    stream = age.chacha20(bytes(range(32)), 1, nonce, sunscreen)
    assert stream[:16].hex() == "6e2e359a2568f98041ba0728dd0d6981"
    assert stream[-8:].hex() == "8eedf2785e42874d"
    shared = age.x25519(
        bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"),
        bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"),
    )
    assert shared.hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    okm = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    assert age.hkdf(b"\x0b" * 22, b"", b"").hex() == okm


# ---- damage


def test_every_byte_of_the_header_and_many_of_the_payload(sealed: bytes, plain: bytes) -> None:
    header = parse_header(sealed).header_bytes
    rng = np.random.default_rng(7)
    places = [*range(header + 33), *rng.integers(header, len(sealed), 60), len(sealed) - 1]
    for place in places:
        for mask in (1, int(rng.integers(2, 256))):
            damaged = bytearray(sealed)
            damaged[place] ^= mask
            with pytest.raises(KeyFileError):
                RecoveryKey.unseal(bytes(damaged), passphrase=PASSPHRASE, max_work_factor=8)


def test_every_byte_of_a_recipients_header(key: RecoveryKey, pair: tuple[str, str]) -> None:
    sealed = key.seal_bytes(recipients=[pair[0]])
    for place in range(parse_header(sealed).header_bytes + 17):
        damaged = bytearray(sealed)
        damaged[place] ^= 1
        with pytest.raises(KeyFileError):
            RecoveryKey.unseal(bytes(damaged), identity=pair[1])


def test_damage_in_the_payload_is_not_a_wrong_secret(sealed: bytes) -> None:
    damaged = sealed[:-1] + bytes([sealed[-1] ^ 1])
    with pytest.raises(KeyFileError, match="damaged") as caught:
        unseal(damaged)
    assert not isinstance(caught.value, WrongSecretError)


def test_every_truncation_and_an_extension(sealed: bytes) -> None:
    header = parse_header(sealed).header_bytes
    for length in [*range(header + 40), *range(header + 40, len(sealed), 97), len(sealed) - 1]:
        with pytest.raises(KeyFileError):
            unseal(sealed[:length])
    for extra in (b"\0", b"\n", sealed, bytes(70_000)):
        with pytest.raises(KeyFileError):
            unseal(sealed + extra)


def test_two_files_cannot_be_spliced(plain: bytes) -> None:
    one, two = age.seal_scrypt(plain, PASSPHRASE), file(X25519)
    cut, other = parse_header(one).header_bytes, parse_header(two).header_bytes
    with pytest.raises(KeyFileError):
        unseal(one[:cut] + two[other:])


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=400), intro=st.booleans())
@example(data=b"", intro=False)
@example(data=b"", intro=True)
@example(data=b"-> X25519\n--- " + b"A" * 43 + b"\n" + bytes(40), intro=True)
def test_any_bytes_give_the_one_error(data: bytes, intro: bool) -> None:
    data = age.INTRO + data if intro else data
    for call in (unseal, inspect_keyfile):
        with pytest.raises(KeyFileError):
            call(data)


# ---- hostile headers


@pytest.mark.parametrize(
    ("stanzas", "match"),
    [
        ("", "no recipient"),
        ("-> \n\n", "malformed"),
        ("->X25519\n\n", "malformed"),
        (f"-> X25519\n{BODY}\n", "malformed"),
        (f"-> X25519 {'A' * 42}\n{BODY}\n", "malformed"),
        (f"-> X25519 {'A' * 43} extra\n{BODY}\n", "malformed"),
        (f"-> X25519  {'A' * 43}\n{BODY}\n", "malformed"),
        (f"-> X25519 {'A' * 43}\n{'A' * 65}\n", "malformed"),
        (f"-> X25519 {'A' * 43}\n{'A' * 64}\n", "malformed"),
        (f"-> X25519 {'A' * 43}\n{'A' * 64}\n\n", "malformed"),
        (f"-> X25519 {'A' * 43}\n{BODY[:-1]}=\n", "malformed"),
        (f"-> X25519 {'A' * 43}\r\n{BODY}\n", "malformed"),
        (f"-> scrypt {'A' * 22}\n{BODY}\n", "malformed"),
        (f"-> scrypt {'A' * 22} 010\n{BODY}\n", "malformed"),
        (f"-> scrypt {'A' * 22} 0\n{BODY}\n", "malformed"),
        (f"-> scrypt {'A' * 22} -1\n{BODY}\n", "malformed"),
        (f"-> scrypt {'A' * 22} 1e9\n{BODY}\n", "malformed"),
        (f"-> scrypt {'A' * 22} {'9' * 500}\n{BODY}\n", "malformed"),
        (f"-> scrypt {'A' * 22} 10\n{BODY}\n{X25519}", "mixes"),
        (f"{X25519}-> scrypt {'A' * 22} 10\n{BODY}\n", "mixes"),
        (f"-> scrypt {'A' * 22} 10\n{BODY}\n" * 2, "mixes"),
        (X25519 * 137, "more than 128 recipients"),
        (X25519 * 5000, "cut short or too long"),
        (f"-> a\n{('A' * 64 + chr(10)) * 2000}\n", "cut short or too long"),
    ],
)
def test_hostile_stanzas(stanzas: str, match: str, pair: tuple[str, str]) -> None:
    data = file(stanzas)
    calls: list[Callable[[], Any]] = [
        lambda: unseal(data),
        lambda: RecoveryKey.unseal(data, identity=pair[1]),
        lambda: inspect_keyfile(data),
    ]
    for call in calls:
        with pytest.raises(KeyFileError, match=match):
            call()


@pytest.mark.parametrize("factor", [MAX_WORK_FACTOR + 1, 30, 63, 99])
def test_a_hostile_work_factor_costs_nothing(factor: int) -> None:
    data = file(f"-> scrypt {'A' * 22} {factor}\n{BODY}\n")
    began = time.perf_counter()
    with pytest.raises(KeyFileError, match=f"work factor {factor}"):
        unseal(data)
    assert time.perf_counter() - began < 1
    assert inspect_keyfile(data)["scrypt_work_factor"] == factor


def test_the_limit_on_work_is_the_callers(sealed: bytes) -> None:
    with pytest.raises(KeyFileError, match="work factor 1, at most 0"):
        RecoveryKey.unseal(sealed, passphrase=PASSPHRASE, max_work_factor=0)


def test_age_stops_what_the_caller_lets_through() -> None:
    # age estimates what the factor would cost on this machine before it starts.
    data = file(f"-> scrypt {'A' * 22} 40\n{BODY}\n")
    with pytest.raises(KeyFileError, match="more scrypt work than"):
        RecoveryKey.unseal(data, passphrase=PASSPHRASE, max_work_factor=99)


def test_other_files_are_named_for_what_they_are() -> None:
    with pytest.raises(KeyFileError, match="armored"):
        unseal(b"-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n")
    for other in (b"", b"\x89PNG\r\n\x1a\n" + bytes(99), b"age-encryption.org/v2\n" + bytes(99)):
        with pytest.raises(KeyFileError, match="not a key file"):
            unseal(other)


def test_a_panic_in_the_backend_is_an_error_too(
    sealed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyrage

    class PanicException(BaseException):
        """What PyO3 raises; it is no Exception."""

    def panic(*_: object) -> bytes:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(pyrage.passphrase, "decrypt", panic)
    with pytest.raises(KeyFileError, match="damaged"):
        unseal(sealed)


# ---- hostile payloads: whoever holds a public key can seal anything to it


def repack(plain: bytes, **changes: Any) -> bytes:
    """Rewrite a payload with tensors or metadata fields replaced."""
    known = {**keyschema._FACE_TENSORS, **keyschema._PICTURE_TENSORS}
    tensors, metadata = unpack(plain, known, keyschema._FIELDS)
    for name, value in changes.items():
        if name in tensors:
            tensors[name] = value(tensors[name])
        else:
            metadata[name] = value
    return age.seal_scrypt(pack(tensors, metadata), PASSPHRASE)


def _nan(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flat[3] = np.nan
    return array


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "something-else"}, "opens, but what it holds is not a recovery key"),
        ({"version": "3"}, "version 3; this diffveil reads 2. Use a newer"),
        ({"version": "1"}, "version 1; this diffveil reads 2. Use diffveil 0.1"),
        ({"version": "1.0"}, "number is malformed"),
        ({"version": "٢"}, "not a recovery key"),
        ({"steps": "+8"}, "number is malformed"),
        ({"steps": "8\n"}, "number is malformed"),
        ({"steps": "99999999999"}, "number is malformed"),
        ({"steps": "1001"}, "steps must be"),
        ({"photo_width": "1000001"}, "photo_size"),
        ({"sampler": "ddim"}, "leaves 1 latents"),
        ({"bundle": "../../etc"}, "bundle"),
        ({"backend": "\u001b[31m"}, "backend"),
        ({"boxes": lambda a: a[:1]}, "number of faces"),
        ({"tokens": lambda a: np.repeat(a, 600, axis=0)}, "number of faces"),
        ({"tokens": lambda a: a[:, :9]}, "tokens must be"),
        ({"latents": lambda a: a[..., :3]}, "latents"),
        ({"tokens": _nan}, "tokens must be finite"),
        ({"latents": _nan}, "latents must be finite"),
        ({"matrices": _nan}, "matrix must be finite"),
        ({"matrices": lambda a: a * 1e300}, "stay within"),
        ({"boxes": lambda a: -a}, "box must have"),
        ({"boxes": lambda a: a[:, :3]}, "box must be"),
        ({"landmarks": lambda a: a[:, :, :1]}, "landmarks must be"),
        ({"numbers": lambda a: a * 0}, "faces must have different numbers"),
        ({"numbers": lambda a: a + 1024}, "number must be 0 to 1023"),
        ({"picture_digests": lambda a: a[:, :31]}, "digest must be 32 bytes"),
        ({"picture_digests": lambda a: np.repeat(a, 2, axis=0)}, "number of pictures"),
        ({"picture_colours": lambda a: a.reshape(1, 4, 16, 3)}, "picture_colours"),
        ({"recipients": "age1"}, "recipients must be"),
        ({"recipients": " "}, "recipients must be"),
    ],
)
def test_hostile_payloads(plain: bytes, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(KeyFileError, match=match) as caught:
        unseal(repack(plain, **changes))
    assert not isinstance(caught.value, WrongSecretError)
    assert "\u001b" not in str(caught.value)


def test_an_unchanged_payload_is_read(plain: bytes, key: RecoveryKey) -> None:
    assert unseal(repack(plain)) == key


def test_a_payload_from_the_future_names_its_version(plain: bytes) -> None:
    text = b'{"__metadata__":{"format":"diffveil-recovery-key","version":"7"},"new":{}}'
    data = age.seal_scrypt(len(text).to_bytes(8, "little") + text, PASSPHRASE)
    with pytest.raises(KeyFileError, match="version 7; this diffveil reads 2"):
        unseal(data)


def test_another_age_file_is_not_a_key() -> None:
    with pytest.raises(KeyFileError, match="not a recovery key"):
        unseal(age.seal_scrypt(b"Dear diary", PASSPHRASE))


# ---- limits on what is given


def test_too_large_a_key_is_not_sealed(pair: tuple[str, str], key: RecoveryKey) -> None:
    latents = np.ones((2, 64, 128, 128), np.float32)  # 8 MiB
    face = dataclasses.replace(key.faces[0], latents=latents)
    faces = tuple(dataclasses.replace(face, number=number) for number in range(8))
    with pytest.raises(KeyFileError, match="Protect fewer faces"):
        dataclasses.replace(key, faces=faces).seal_bytes(recipients=[pair[0]])


def test_recipients_are_checked_counted_and_merged(key: RecoveryKey, pair: tuple[str, str]) -> None:
    recipient = pair[0]
    wrong = recipient[:-1] + ("q" if recipient[-1] != "q" else "p")  # the checksum fails
    for bad in (wrong, recipient.upper(), "", "ssh-ed25519 AAAA", recipient + "\n" + recipient):
        with pytest.raises(OptionError, match="Recipient 2 is not"):
            key.seal_bytes(recipients=[recipient, bad])
    with pytest.raises(OptionError, match="129 recipients"):
        key.seal_bytes(recipients=[f"age1{number}" for number in range(129)])
    facts = inspect_keyfile(key.seal_bytes(recipients=[recipient, f" {recipient}\n"]))
    assert facts["recipients"] == {"X25519": 1}


def test_identities_are_checked_and_counted(
    sealed: bytes, pair: tuple[str, str], tmp_path: Any
) -> None:
    identity = pair[1]
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\xfd")
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    large = tmp_path / "large"
    large.write_text("#" * 70_000)
    for path in (binary, large, tmp_path, tmp_path / "absent", "AGE-PLUGIN-YUBIKEY-1"):
        with pytest.raises(OptionError, match="neither"):
            RecoveryKey.unseal(sealed, identity=path)
    with pytest.raises(OptionError, match="holds 0 keys"):
        RecoveryKey.unseal(sealed, identity=empty)
    with pytest.raises(OptionError, match="holds 33 keys"):
        RecoveryKey.unseal(sealed, identity="\n".join([identity] * 33))
    with pytest.raises(OptionError, match="Line 2"):
        RecoveryKey.unseal(sealed, identity=f"{identity}\n{identity[:-1]}")


# ---- inspection


def test_inspection_needs_and_shows_no_secret(key: RecoveryKey, pair: tuple[str, str]) -> None:
    pairs = [pair, generate_identity()]
    sealed = key.seal_bytes(recipients=[recipient for recipient, _ in pairs])
    facts = inspect_keyfile(sealed)
    assert facts == {
        "format": "age-encryption.org/v1",
        "bytes": len(sealed),
        "sealed_to": "recipients",
        "recipients": {"X25519": 2},
        "scrypt_work_factor": None,
        "payload_bytes": len(sealed) - sealed.index(b"\n", sealed.index(b"\n--- ") + 1) - 1,
    }
    for recipient, identity in pairs:  # age hides whom a file is for
        assert recipient not in str(facts)
        assert identity not in str(facts)


def test_inspection_counts_foreign_stanzas_but_not_grease() -> None:
    facts = inspect_keyfile(file(f"{X25519}-> ssh-ed25519 x y\n{BODY}\n-> joint-grease a\n\n"))
    assert facts["recipients"] == {"X25519": 1, "ssh-ed25519": 1}


# ---- the dependency


def test_pyrage_is_imported_late() -> None:
    code = "import sys, diffveil.keys; sys.exit('pyrage' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_pyrage_the_error_says_what_to_install(
    key: RecoveryKey, sealed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)
    calls: list[Callable[[], Any]] = [
        generate_identity,
        lambda: unseal(sealed),
        lambda: key.seal_bytes(passphrase=PASSPHRASE),
    ]
    for call in calls:
        with pytest.raises(BackendUnavailableError, match="pip install pyrage"):
            call()
    assert inspect_keyfile(sealed)["sealed_to"] == "passphrase"  # needs nothing


def test_the_wrap_is_what_the_format_says(sealed: bytes) -> None:
    # The header's MAC by hand, from the file key that the oracle used: not by the oracle's reader.
    signed = sealed[: sealed.index(b"\n--- ") + 4]
    mac_key = age.hkdf(bytes(range(100, 116)), b"", b"header")
    mac = hmac.new(mac_key, signed, hashlib.sha256).digest()
    assert age.b64(mac).encode() in sealed
