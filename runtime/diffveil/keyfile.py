"""Sealing and opening key files: standard age v1 files, by way of `pyrage`.

age does the cryptography. What is added here is what a service needs around it: limits that are
checked before any work is spent on a file that a stranger may have sent, and one error class a
cause. No function here keeps, logs or quotes a secret. Plaintexts are wiped after use; Python
cannot wipe strings, so a passphrase lives until the interpreter drops it: hold it no longer than
needed.

Source: the age file format, version 1, https://c2sp.org/age.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from diffveil.errors import KeyFileError, WrongSecretError
from diffveil.keysecrets import MAX_RECIPIENTS, Secret, load_pyrage
from diffveil.privatefile import StrPath, read_file

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_WORK_FACTOR",
    "Header",
    "inspect_keyfile",
    "open_sealed",
    "parse_header",
    "seal_payload",
]

MAX_FILE_BYTES = 64 << 20  # 64 MiB: some 350 faces at the size of Stable Diffusion 1.x
# scrypt takes 2^(factor + 10) bytes: 2 GiB at 21. pyrage seals with what it takes for about one
# second of this machine's time, 18 to 20 on those of today; the age tool accepts up to 22.
MAX_WORK_FACTOR = 21

_MAX_HEADER_BYTES = 64 << 10
_MAX_PAYLOAD_BYTES = MAX_FILE_BYTES - (256 << 10)  # room for header, nonce and chunk tags
_MIN_SEALED_BYTES = 16 + 16  # the nonce, and the tag of an empty last chunk
_MAX_GREASE = 8  # implementations may add stanzas that mean nothing

_INTRO = b"age-encryption.org/v1\n"
_ARMOR = b"-----BEGIN AGE ENCRYPTED FILE-----"
_STANZA = re.compile(r"-> ([!-~]+(?: [!-~]+)*)")
_BODY_LINE = re.compile(r"[A-Za-z0-9+/]{0,64}")
_MAC = re.compile(r"--- [A-Za-z0-9+/]{43}")
# Arguments of the two types that are used here. Both wrap the file key into 43 base64 characters.
_ARGUMENTS = {
    "X25519": re.compile(r"[A-Za-z0-9+/]{43}"),
    "scrypt": re.compile(r"[A-Za-z0-9+/]{22} [1-9][0-9]?"),
}
_WRAPPED_CHARACTERS = 43

# pyrage has one exception class for every failure, so its text decides; tests hold all three.
_WRONG_SECRET = ("No matching keys found", "Decryption failed")
_EXCESSIVE_WORK = "Excessive work parameter"


@dataclass(frozen=True)
class Header:
    """The public part of an age file.

    Attributes:
        recipients: the types of the recipient stanzas in file order, such as `X25519` or `scrypt`.
        work_factor: log2 of scrypt's cost where the file is sealed to a passphrase, else None.
        header_bytes: size of the header with its MAC line, in bytes.
        payload_bytes: size of the encrypted payload, in bytes.
    """

    recipients: tuple[str, ...]
    work_factor: int | None
    header_bytes: int
    payload_bytes: int


def parse_header(data: bytes) -> Header:
    """Read an age header; no secret is needed, and so nothing in it is authenticated yet.

    Args:
        data: the whole file.

    Raises:
        KeyFileError: it is not an age v1 file, or its header is malformed or beyond a limit.
    """
    if data.startswith(_ARMOR):
        raise KeyFileError(
            "The key file is armored (text) age, but key files are binary: decode it with the age "
            "tool and encrypt it again without --armor."
        )
    if not data.startswith(_INTRO):
        raise KeyFileError("This is not a key file: it does not begin as an age v1 file does.")
    mark = data.find(b"\n--- ", 0, _MAX_HEADER_BYTES)
    end = data.find(b"\n", mark + 1, mark + 64) if mark >= 0 else -1
    if end < 0:
        raise KeyFileError("The key file's age header is cut short or too long.")
    text = data[len(_INTRO) : end]
    if not text.isascii():
        raise KeyFileError("The key file's age header holds bytes that are not ASCII.")
    *lines, mac = text.decode("ascii").split("\n")
    if not _MAC.fullmatch(mac):
        raise KeyFileError("The key file's age header has no valid MAC line.")
    stanzas = _split_stanzas(lines)
    kinds = tuple(kind for kind, _, _ in stanzas)
    if len(kinds) > MAX_RECIPIENTS + _MAX_GREASE:
        raise KeyFileError(f"The key file is sealed to more than {MAX_RECIPIENTS} recipients.")
    if "scrypt" in kinds and len(kinds) > 1:
        raise KeyFileError("The key file mixes a passphrase with recipients, which age forbids.")
    factor = int(stanzas[0][1].split(" ")[1]) if kinds == ("scrypt",) else None
    payload = len(data) - end - 1
    if payload < _MIN_SEALED_BYTES:
        raise KeyFileError("The key file is cut short: its payload is missing.")
    return Header(kinds, factor, end + 1, payload)


def _split_stanzas(lines: Sequence[str]) -> list[tuple[str, str, str]]:
    """Split the header's lines into stanzas: type, arguments and body of each."""
    malformed = KeyFileError("The key file's age header has a malformed recipient stanza.")
    stanzas = []
    rest = iter(lines)
    for line in rest:
        match = _STANZA.fullmatch(line)
        if not match:
            raise malformed
        kind, _, arguments = match[1].partition(" ")
        body = ""
        for part in rest:  # full lines of 64 columns, then one that is shorter, perhaps empty
            if not _BODY_LINE.fullmatch(part):
                raise malformed
            body += part
            if len(part) < 64:
                break
        else:
            raise malformed
        if kind in _ARGUMENTS and not (
            _ARGUMENTS[kind].fullmatch(arguments) and len(body) == _WRAPPED_CHARACTERS
        ):
            raise malformed
        stanzas.append((kind, arguments, body))
    if not stanzas:
        raise KeyFileError("The key file's age header names no recipient.")
    return stanzas


def seal_payload(payload: bytearray, secret: Secret) -> bytes:
    """Encrypt a payload.

    Args:
        payload: plaintext bytes.
        secret: a passphrase (stretching it takes one to two seconds and up to 1 GiB of memory) or
            recipients.

    Raises:
        KeyFileError: the sealed file would be larger than is ever read.
        BackendUnavailableError: `pyrage` is not installed.
    """
    if len(payload) > _MAX_PAYLOAD_BYTES:
        raise KeyFileError(
            f"The recovery key takes {len(payload)} bytes; a key file holds at most "
            f"{_MAX_PAYLOAD_BYTES}. Protect fewer faces at once."
        )
    return secret.encrypt(payload)


def open_sealed(
    data: bytes, secret: Secret, *, max_work_factor: int = MAX_WORK_FACTOR
) -> bytearray:
    """Decrypt an age file and return its plaintext, in memory that the caller can wipe.

    Args:
        data: the whole file.
        secret: a passphrase, exactly as it was given when sealing, or an identity.
        max_work_factor: largest accepted log2 of scrypt's cost.

    Raises:
        OptionError: the identity is none.
        WrongSecretError: the secret does not open this file.
        KeyFileError: the file is damaged, too large, or asks for more work than is accepted.
        BackendUnavailableError: `pyrage` is not installed.
    """
    if len(data) > MAX_FILE_BYTES:
        raise KeyFileError(f"The key file is larger than {MAX_FILE_BYTES} bytes.")
    header = parse_header(data)
    factor = header.work_factor
    if secret.is_passphrase:
        if factor is None:
            raise WrongSecretError("The key file is sealed to recipients: open it by an identity.")
        if factor > max_work_factor:
            raise KeyFileError(
                f"The key file asks for scrypt work factor {factor}, at most {max_work_factor} is "
                "accepted: time and memory double with each. If you trust it, pass a higher limit."
            )
    else:
        secret.read_identities()
        if factor is not None:
            raise WrongSecretError("The key file is sealed to a passphrase: no identity opens it.")
    return _decrypt(data, secret, header.payload_bytes)


def _decrypt(data: bytes, secret: Secret, payload_bytes: int) -> bytearray:
    """Run a decryption; tell a wrong secret from a damaged file."""
    pyrage = load_pyrage()
    try:
        return secret.decrypt(data, payload_bytes)
    except (pyrage.DecryptError, OSError) as error:  # OSError: damage behind the header
        text = str(error)
    except BaseException as error:
        # A Rust panic is no `Exception`: hostile input must not get past a caller's handlers.
        if type(error).__name__ != "PanicException":
            raise
        text = ""
    if text.startswith(_WRONG_SECRET):
        kind = "passphrase" if secret.is_passphrase else "identity"
        raise WrongSecretError(
            f"The {kind} does not open this key file: it belongs to another one, or the file's "
            "header was altered."
        )
    if text.startswith(_EXCESSIVE_WORK):
        raise KeyFileError("The key file asks for more scrypt work than this machine should do.")
    raise KeyFileError("The key file is damaged: it fails authentication.")


def inspect_keyfile(source: StrPath | bytes) -> dict[str, object]:
    """Say what can be known of a key file without its secret; none of it is authenticated.

    Args:
        source: the path of a key file, or its bytes.

    Returns:
        JSON-able fields: `format`, `bytes`, `sealed_to` ("passphrase" or "recipients"),
        `recipients` (number of stanzas by age type), `scrypt_work_factor` (or None) and
        `payload_bytes` (encrypted).

    Raises:
        KeyFileError: the file cannot be read or is not a key file.
    """
    data = source if isinstance(source, bytes) else read_file(source, MAX_FILE_BYTES)
    header = parse_header(data)
    # Grease (made-up stanzas that keep readers honest) would look like a recipient to people.
    kinds = Counter(kind for kind in header.recipients if not kind.endswith("-grease"))
    return {
        "format": _INTRO.decode("ascii").strip(),
        "bytes": len(data),
        "sealed_to": "recipients" if header.work_factor is None else "passphrase",
        "recipients": dict(sorted(kinds.items())),
        "scrypt_work_factor": header.work_factor,
        "payload_bytes": header.payload_bytes,
    }
