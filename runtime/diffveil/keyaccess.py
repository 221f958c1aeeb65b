"""Who may open a key file, changed without touching the picture."""

from __future__ import annotations

from collections.abc import Sequence

from diffveil.errors import OptionError
from diffveil.keyfile import MAX_WORK_FACTOR
from diffveil.keys import RecoveryKey
from diffveil.keysecrets import Secret
from diffveil.privatefile import StrPath

__all__ = ["reseal", "reseal_with"]


def reseal(
    path: StrPath,
    *,
    passphrase: str | None = None,
    identity: StrPath | None = None,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    recipients: Sequence[str] | None = None,
    new_passphrase: str | None = None,
    allow_weak_passphrase: bool = False,
    target: StrPath | None = None,
    max_work_factor: int = MAX_WORK_FACTOR,
) -> tuple[str, ...]:
    """Open a key file and seal it anew, with a fresh file key, in its own place.

    Copies of the old file still open with the old secrets: to lock somebody out, they must be gone.

    Args:
        path: the key file; it is replaced whole or not at all.
        passphrase: opens it; or
        identity: opens it, see `RecoveryKey.unseal`.
        add: public keys to seal it to as well.
        remove: public keys to seal it to no longer.
        recipients: all public keys to seal it to, in place of `add` and `remove`.
        new_passphrase: a passphrase to seal it to, in place of recipients.
        allow_weak_passphrase: see `RecoveryKey.seal`.
        target: another file to write; it must not exist. `path` then stays as it is.
        max_work_factor: see `RecoveryKey.unseal`.

    Returns:
        The public keys that it is sealed to now.

    Raises:
        OptionError: the arguments contradict each other, one of `remove` is not among the file's
            recipients, nobody could open the result, or `target` exists.
        WrongSecretError: the secret does not open the file.
        KeyFileError: the file is damaged, or cannot be read or written.
    """
    opening = Secret.to_open(passphrase, identity)
    ways = [bool(add or remove), recipients is not None, new_passphrase is not None]
    sealing = None
    if sum(ways) == 1 and not ways[0]:
        sealing = Secret.to_seal(new_passphrase, recipients or (), allow_weak=allow_weak_passphrase)
    del passphrase, identity, new_passphrase  # not in the tracebacks of what follows
    if sum(ways) != 1:
        raise OptionError(
            "Seal it to what? Give recipients to add or remove, or all recipients, or a new "
            "passphrase."
        )
    return reseal_with(
        path,
        opening,
        sealing,
        add=add,
        remove=remove,
        target=target,
        max_work_factor=max_work_factor,
    )


def reseal_with(
    path: StrPath,
    opening: Secret,
    sealing: Secret | None,
    *,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    target: StrPath | None = None,
    max_work_factor: int = MAX_WORK_FACTOR,
) -> tuple[str, ...]:
    """As `reseal`, with secrets that are checked already; no `sealing`: the changed recipients."""
    with RecoveryKey.open_with(path, opening, max_work_factor=max_work_factor) as key:
        if sealing is None:
            wanted = _changed(key.recipients, add, remove)
            sealing = Secret.to_seal(None, wanted, allow_weak=False)
        key.seal_with(path if target is None else target, sealing, overwrite=target is None)
    return sealing.recipients


def _changed(present: Sequence[str], add: Sequence[str], remove: Sequence[str]) -> tuple[str, ...]:
    if not present:
        raise OptionError(
            "The key file names no recipients to add to or remove from: it is sealed to a "
            "passphrase, or its writer named none. Give all recipients."
        )
    for place, one in enumerate(remove, start=1):
        if one.strip() not in present:
            raise OptionError(f"Recipient {place} to remove is none of the file's recipients.")
    gone = {one.strip() for one in remove}
    kept = tuple(one for one in (*present, *add) if one.strip() not in gone)
    if not kept:
        raise OptionError("Nobody could open the key file if all its recipients were removed.")
    return kept
