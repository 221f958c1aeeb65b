"""Every error a caller can meet.

    DiffveilError                    never raised itself
    ├── PhotoError                   a photo cannot be read, is too large, or is not a photo
    ├── NoFaceError                  no face was found and the policy says that this is an error
    ├── OptionError                  an argument is out of range or contradicts another
    ├── BundleError                  a bundle is missing, incomplete or not a bundle
    │   ├── BundleVersionError       written by a newer diffveil
    │   └── BundleCorruptError       a file differs from the hash that the manifest states
    ├── EngineError                  a backend cannot load or run a program
    │   └── BackendUnavailableError  the backend, or a package it needs, is not installed
    ├── KeyFileError                 a key file is damaged or not a key file
    │   └── WrongSecretError         the passphrase or identity does not open it
    └── KeyMismatchError             the key is sound but belongs to another bundle or photo

Messages name the tensor, file or option, what was received, what was expected and what to do.
They never contain pixels, embeddings, key material or passphrases.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "BundleCorruptError",
    "BundleError",
    "BundleVersionError",
    "DiffveilError",
    "EngineError",
    "KeyFileError",
    "KeyMismatchError",
    "NoFaceError",
    "OptionError",
    "PhotoError",
    "WrongSecretError",
]


class DiffveilError(Exception):
    """Base of every error that diffveil raises on purpose."""


class PhotoError(DiffveilError):
    """A photo cannot be read, is too large, or is not a photo."""


class NoFaceError(DiffveilError):
    """No face was found, and the policy says that this is an error."""


class OptionError(DiffveilError, ValueError):
    """An argument is out of range or contradicts another."""


class BundleError(DiffveilError):
    """A bundle is missing, incomplete or not a bundle."""


class BundleVersionError(BundleError):
    """A bundle was written in a format version that this diffveil does not read."""


class BundleCorruptError(BundleError):
    """A file of a bundle differs from what its manifest states."""


class EngineError(DiffveilError):
    """A backend cannot load or run a program."""


class BackendUnavailableError(EngineError):
    """A backend, or a package that it needs, is not installed on this machine."""


class KeyFileError(DiffveilError):
    """A key file is damaged or is not a key file."""


class WrongSecretError(KeyFileError):
    """The passphrase or identity does not open this key file."""


class KeyMismatchError(DiffveilError):
    """A recovery key is sound but belongs to another bundle or photo."""
