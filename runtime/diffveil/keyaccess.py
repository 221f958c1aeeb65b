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
    added, removed = Secret.to_seal(None, add), Secret.to_seal(None, remove)
    sealing = None
    if recipients is not None or new_passphrase is not None:
        sealing = Secret.to_seal(new_passphrase, recipients or (), allow_weak=allow_weak_passphrase)
    changing = bool(add or remove)
    # So that no traceback of an error carries them; identities get pasted where recipients belong.
    del passphrase, identity, add, remove, recipients, new_passphrase
    opening.check()
    if changing == (sealing is not None):
        raise OptionError(
            "Seal it to what? Give recipients to add or remove, or all recipients, or a new "
            "passphrase."
        )
    return reseal_with(
        path,
        opening,
        sealing.check() if sealing else None,
        add=added,
        remove=removed,
        target=target,
        max_work_factor=max_work_factor,
    )


def reseal_with(
    path: StrPath,
    opening: Secret,
    sealing: Secret | None,
    *,
    add: Secret,
    remove: Secret,
    target: StrPath | None = None,
    max_work_factor: int = MAX_WORK_FACTOR,
) -> tuple[str, ...]:
    """As `reseal`, with secrets that are checked already; no `sealing`: recipients changed."""
    with RecoveryKey.open_with(path, opening, max_work_factor=max_work_factor) as key:
        if sealing is None:
            sealing = _changed(key, add, remove).check()
        key.seal_with(path if target is None else target, sealing, overwrite=target is None)
    return sealing.recipients


def _changed(key: RecoveryKey, add: Secret, remove: Secret) -> Secret:
    """The recipients of an opened key, with some more and some less."""
    if not key.recipients:
        raise OptionError(
            "The key file names no recipients to add to or remove from: it is sealed to a "
            "passphrase, or its writer named none. Give all recipients."
        )
    unknown = set(remove.recipients).difference(key.recipients)
    if unknown:
        count = len(unknown)
        del unknown
        raise OptionError(f"{count} of those to remove are none of the file's recipients.")
    everyone = (*key.recipients, *add.recipients)
    kept = Secret.to_seal(None, [one for one in everyone if one not in remove.recipients])
    del everyone
    if not kept.recipients:
        raise OptionError("Nobody could open the key file if all its recipients were removed.")
    return kept
