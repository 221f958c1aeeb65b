"""What the fuzzer calls: everything that reads bytes of strangers on the way to a recovery key.

The first byte of an input chooses the target, the rest is the target's. A target passes when it
returns or raises an error that is documented for it; what it accepts must survive a round trip.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffveil.errors import KeyFileError, OptionError
from diffveil.keyfile import parse_header
from diffveil.keys import RecoveryKey, inspect_keyfile
from diffveil.keyschema import read_key, write_key
from diffveil.keysecrets import Secret
from diffveil.torchtensors import read_tensors

__all__ = ["IDENTITY", "MAX_INPUT_BYTES", "PASSPHRASE", "TARGETS", "run_one"]

# Of nobody: they open the files of the corpus and nothing else.
PASSPHRASE = "corpus"
IDENTITY = "AGE-SECRET-KEY-14XSDX2GYRT9YKFRNSWFTEQ7JX07TVUCNNVLJ7DHLPTTEC074XCTQ95TRXT"

MAX_INPUT_BYTES = 8192
_CHEAP_WORK = 4
_PAYLOAD = (Path(__file__).parent / "corpus" / "payload").read_bytes()[1:]
_BODY = _PAYLOAD[8 + int.from_bytes(_PAYLOAD[:8], "little") :]


def fuzz_payload(data: bytes) -> None:
    """A decrypted payload: anyone can seal anything to a public key."""
    key = RecoveryKey(**read_key(data))
    again = RecoveryKey(**read_key(write_key(key, key.recipients)))
    assert again == key
    assert again.recipients == key.recipients


def fuzz_header(data: bytes) -> None:
    """The header of a payload alone, before the numbers of a sound one."""
    fuzz_payload(len(data).to_bytes(8, "little") + data + _BODY)


def fuzz_file(data: bytes) -> None:
    """A whole key file."""
    facts = inspect_keyfile(data)
    assert facts["bytes"] == len(data)
    header = parse_header(data)
    assert header.header_bytes + header.payload_bytes == len(data)
    if header.work_factor is None:
        RecoveryKey.unseal(data, identity=IDENTITY)
    else:
        RecoveryKey.unseal(data, passphrase=PASSPHRASE, max_work_factor=_CHEAP_WORK)


def fuzz_tensors(data: bytes) -> None:
    """A file of `torch.save`."""
    for tensor in read_tensors(data):
        assert 0 < tensor.nbytes <= len(data)


def fuzz_identity(data: bytes) -> None:
    """The text of an identity; the marker makes it text rather than a path."""
    Secret.to_open(
        None, "#SECRET-KEY-\n" + data.decode("utf-8", "surrogateescape")
    ).read_identities()


TARGETS: tuple[Callable[[bytes], None], ...] = (
    fuzz_payload,
    fuzz_file,
    fuzz_tensors,
    fuzz_identity,
    fuzz_header,
)


def run_one(data: bytes) -> bool:
    """Run the target that the first byte names.

    Returns:
        Whether the input was accepted.

    Raises:
        AssertionError: something was accepted or said that must not be.
    """
    if not data or len(data) > MAX_INPUT_BYTES:
        return False
    try:
        TARGETS[data[0] % len(TARGETS)](data[1:])
    except (KeyFileError, OptionError) as error:
        if not str(error).isprintable():
            raise AssertionError("an error quotes what it was given") from error
        return False
    return True
