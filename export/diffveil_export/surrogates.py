"""Makes the surrogates of a bundle out of many people's faces; see `diffveil.surrogates`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from diffveil.bundle import MANIFEST_FILE, SURROGATES_FILE, Bundle
from diffveil.engines import Programs
from diffveil.errors import OptionError
from diffveil.surrogates import Surrogates
from diffveil_export.bundle_writer import copy_bundle, digest, staged_folder, write_json

__all__ = ["PEOPLE", "add_surrogates", "look_at", "mix"]

_F32: TypeAlias = NDArray[np.float32]

PEOPLE = 4
"""How many people a surrogate is the mean of."""

_CHUNK = 64  # faces that are compared with all others at once
_VARIANCE = 0.999  # share that is kept
_SAME_PERSON = 0.3  # cosine above which two faces may be one person's


def look_at(
    programs: Programs,
    crops: Iterable[NDArray[np.float32]],
    progress: Callable[[int], None] | None = None,
) -> tuple[_F32, _F32]:
    """Stage tokens and embeddings of faces and of their mirror images.

    Args:
        programs: Programs of the bundle.
        crops: Batches of aligned crops, each float32 [B, 3, S, S] in [-1, 1].
        progress: Called after each batch with the number of faces in it.

    Returns:
        Tokens, float32 [2·M, 10, D]; embeddings, float32 [2·M, E].

    Raises:
        OptionError: There are no crops.
        EngineError: A program failed.
    """
    tokens, identities = [], []
    for batch in crops:
        for images in (batch, np.ascontiguousarray(batch[:, :, :, ::-1])):
            tokens.append(programs.embed(image=images))
            identities.append(programs.recognize(image=images))
        if progress is not None:
            progress(len(batch))
    if not tokens:
        raise OptionError("surrogates: received no faces")
    return np.concatenate(tokens), np.concatenate(identities)


def mix(
    tokens: _F32, identities: _F32, count: int, *, people: int = PEOPLE, seed: int = 0
) -> Surrogates:
    """Surrogates out of faces: each the mean of a face drawn at random and of those nearest to it.

    Their tokens are kept in as many directions as 99.9 % of the variance needs.

    Args:
        tokens: Stage tokens of faces, float32 [M, 10, D].
        identities: Their embeddings, float32 [M, E], unit length.
        count: Number of surrogates at most; no more than there are faces.
        people: Faces of a surrogate, no two of them like one person's.
        seed: Of the draw.

    Raises:
        OptionError: A surrogate would need more different people than there are.
    """
    if count < 1 or people < 2:
        raise OptionError(
            f"surrogates: received count {count} and {people} people, expected at least 1 and 2"
        )
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(tokens), min(count, len(tokens)), replace=False)
    looks = (tokens - tokens.mean(axis=0)).reshape(len(tokens), -1)
    looks /= np.maximum(np.linalg.norm(looks, axis=1, keepdims=True), 1e-6)
    means, seen = [], []
    for start in range(0, len(drawn), _CHUNK):
        firsts = drawn[start : start + _CHUNK]
        for first, nearness in zip(firsts, looks[firsts] @ looks.T, strict=True):
            members = [int(first)]
            strangers = identities @ identities[first] < _SAME_PERSON
            for _ in range(people - 1):
                if not strangers.any():
                    raise OptionError(
                        f"surrogates: received faces of too few people, expected {people} "
                        "different ones or more"
                    )
                nearest = int(np.argmax(np.where(strangers, nearness, -np.inf)))
                members.append(nearest)
                strangers &= identities @ identities[nearest] < _SAME_PERSON
            means.append(tokens[members].mean(axis=0))
            mean = identities[members].mean(axis=0)
            seen.append(mean / np.linalg.norm(mean))
    return _compressed(np.stack(means), np.stack(seen))


def _compressed(tokens: _F32, identities: _F32) -> Surrogates:
    """Principal components: tokens of faces fill few of their dimensions."""
    mean = tokens.mean(axis=0)
    flat = (tokens - mean).reshape(len(tokens), -1)
    _, sizes, directions = np.linalg.svd(flat, full_matrices=False)
    kept = np.cumsum(sizes.astype(np.float64) ** 2)
    rank = 1 + int(np.searchsorted(kept, _VARIANCE * kept[-1]))
    basis = directions[: min(rank, len(directions))]
    return Surrogates(mean, basis.reshape(-1, *mean.shape), flat @ basis.T, identities)


def add_surrogates(
    bundle: Bundle, surrogates: Surrogates, target: Path, *, origin: str, force: bool = False
) -> Bundle:
    """Write a copy of a bundle that holds surrogates as well; recovery keys stay valid.

    Engines that were built from the bundle are not copied.

    Args:
        bundle: Any bundle; one that has surrogates gets them replaced.
        surrogates: Made with this bundle's `embed` and `recognize`.
        target: Folder to create; the bundle's own with `force`.
        origin: Whose faces they are made of, for the bundle's provenance.
        force: Replace a bundle that is already there.

    Raises:
        OptionError: The surrogates do not fit the bundle, or `target` exists.
    """
    d = bundle.dimensions
    wanted = ((d.stages, d.token_width), (d.embedding_width,))
    given = (surrogates.mean.shape, surrogates.identities.shape[1:])
    if given != wanted:
        raise OptionError(f"the surrogates are for {given}, the bundle has {wanted}")
    bundle.verify(full=True)
    with staged_folder(target, force=force) as folder:
        copy_bundle(bundle, folder)
        attributes = ("mean", "basis", "coefficients", "identities")
        # In C order: safetensors writes memory as it lies.
        tensors = {n: getattr(surrogates, n).astype(np.float16, order="C") for n in attributes}
        save_file(tensors, folder / SURROGATES_FILE)
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        manifest["files"][SURROGATES_FILE] = digest(folder / SURROGATES_FILE)
        manifest["provenance"]["surrogates"] = origin
        write_json(folder, manifest)
        Surrogates.load(Bundle.load(folder))
    return Bundle.load(target)
