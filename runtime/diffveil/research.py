"""Keys of the published method's research release, as recovery keys.

The release keeps key-E as a list of ten conditionings and key-I as one noise map, in two files of
`torch.save`, unencrypted: whoever has them has the face. Import them, then delete them.

Source: He et al., "Diff-Privacy: Diffusion-based Face Privacy Protection", arXiv 2309.05330.
"""

from __future__ import annotations

import numpy as np

from diffveil.bundle import Bundle
from diffveil.errors import KeyFileError, KeyMismatchError, OptionError
from diffveil.keys import FaceKey, RecoveryKey
from diffveil.photos import PhotoSource, load_photo
from diffveil.pictures import picture_of
from diffveil.privatefile import StrPath, read_file
from diffveil.scenes import aligned_scene
from diffveil.torchtensors import MAX_TENSOR_FILE_BYTES, read_tensors

__all__ = ["RESEARCH_STEPS", "import_research_key"]

RESEARCH_STEPS = 100
"""Steps of DDIM in the release."""


def import_research_key(
    bundle: Bundle,
    photo: PhotoSource,
    embedding: StrPath | bytes,
    noise_map: StrPath | bytes,
    *,
    steps: int = RESEARCH_STEPS,
) -> RecoveryKey:
    """Make a recovery key of the release's two files; nothing in them is run.

    Args:
        bundle: An export of the weights that the keys were made with. The files do not name them,
            so this is your word.
        photo: The protected photo, or any picture of that size: one aligned face, square. The key
            will belong to it.
        embedding: `*_embedding.pt` (path or bytes): a list of ten conditionings, float32 [1, T, W].
        noise_map: `*_zt.pt` (path or bytes): float32 [1, C, s, s].
        steps: Steps of DDIM that made the noise map.

    Returns:
        A key of one face. Its `tokens` are the conditionings, unrounded: [10, T, W].

    Raises:
        KeyFileError: A file cannot be read, or does not hold these tensors and nothing else.
        KeyMismatchError: The tensors do not have the bundle's shapes.
        PhotoError: The photo cannot be read, or is not square.
        OptionError: `steps` is out of range.
    """
    d = bundle.dimensions
    conditionings = _tensors(embedding)
    (first, *others) = conditionings
    if len(conditionings) != d.stages or first.ndim != 3 or len(first) != 1:
        raise KeyFileError(f"key-E: expected a list of {d.stages} tensors [1, T, W].")
    if any(one.shape != first.shape or one.dtype != first.dtype for one in others):
        raise KeyFileError("key-E: its tensors must have one shape and dtype.")
    (noise, *more) = _tensors(noise_map)
    if more or noise.ndim != 4 or len(noise) != 1:
        raise KeyFileError("key-I: expected one tensor [1, C, s, s].")
    wanted = (d.conditioning_length, d.conditioning_width)
    latent = (d.latent_channels, d.latent_size, d.latent_size)
    if first.shape[1:] != wanted or noise.shape[1:] != latent:
        raise KeyMismatchError(
            f"the files hold key-E {list(first.shape[1:])} and key-I {list(noise.shape[1:])}, but "
            f"bundle '{bundle.name}' takes {list(wanted)} and {list(latent)}; give a bundle that "
            "was exported from the weights that made them"
        )
    scene = aligned_scene(load_photo(photo), bundle.template, bundle.image_size)
    (face,), (matrix,) = scene.faces, scene.matrices
    try:
        key_e = np.concatenate(conditionings)
        face_key = FaceKey(key_e, noise, matrix, face.box, face.landmarks)
    except OptionError as error:
        raise KeyFileError(f"The files do not hold a key. {error}") from error
    return RecoveryKey(
        faces=(face_key,),
        bundle=bundle.fingerprint,
        sampler="ddim",
        steps=steps,
        photo_size=(scene.photo.height, scene.photo.width),
        pictures=(picture_of(scene.photo),),
        backend="research-release",
        precision="float32",
    )


def _tensors(source: StrPath | bytes) -> list[np.ndarray]:
    data = source if isinstance(source, bytes) else read_file(source, MAX_TENSOR_FILE_BYTES)
    return read_tensors(data)
