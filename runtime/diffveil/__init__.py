"""Protects faces in photos with a diffusion model; who holds the key gets them back.

protector = diffveil.Protector.load()
result = protector.anonymize("group.jpg")
result.save("group-anonymized.jpg")
result.key.seal("group.veilkey", passphrase="…")

key = diffveil.RecoveryKey.unseal("group.veilkey", passphrase="…")
protector.recover("group-anonymized.jpg", key).save("group-recovered.png")
"""

from __future__ import annotations

from diffveil._version import __version__
from diffveil.bundle import Bundle
from diffveil.engines import BackendWarning
from diffveil.errors import (
    BackendUnavailableError,
    BundleCorruptError,
    BundleError,
    BundleVersionError,
    DiffveilError,
    EngineError,
    KeyFileError,
    KeyMismatchError,
    NoFaceError,
    OptionError,
    PhotoError,
    WrongSecretError,
)
from diffveil.faces import Face, FaceDetector
from diffveil.keyaccess import reseal
from diffveil.keys import FaceKey, Picture, RecoveryKey, generate_identity, inspect_keyfile
from diffveil.noise import NoiseKey
from diffveil.photos import Photo, load_photo, save_photo
from diffveil.plans import Guidance, Inversion, Plan, Preset
from diffveil.presets import PRESETS, preset
from diffveil.protector import Protector
from diffveil.research import import_research_key
from diffveil.result import FaceEmbeddings, Result

__all__ = [
    "PRESETS",
    "BackendUnavailableError",
    "BackendWarning",
    "Bundle",
    "BundleCorruptError",
    "BundleError",
    "BundleVersionError",
    "DiffveilError",
    "EngineError",
    "Face",
    "FaceDetector",
    "FaceEmbeddings",
    "FaceKey",
    "Guidance",
    "Inversion",
    "KeyFileError",
    "KeyMismatchError",
    "NoFaceError",
    "NoiseKey",
    "OptionError",
    "Photo",
    "PhotoError",
    "Picture",
    "Plan",
    "Preset",
    "Protector",
    "RecoveryKey",
    "Result",
    "WrongSecretError",
    "__version__",
    "generate_identity",
    "import_research_key",
    "inspect_keyfile",
    "load_photo",
    "preset",
    "reseal",
    "save_photo",
]
