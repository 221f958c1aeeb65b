"""Surrogates: looks of people who do not exist, for new faces to be drawn with.

A surrogate is the mean of the stage tokens of a few people who are held and lit alike (as k-Same
averages faces: Newton, Sweeney and Malin, "Preserving privacy by de-identifying face images", IEEE
TKDE 17(2), 2005, there in pixels). Conditioned on one, a face comes out whole, and as nobody; an
unconditioned one has to be made up from its surroundings. A bundle may carry a collection of them;
`diffveil_export.surrogates` makes it.

Axes: N faces, V variants of each, K surrogates, R directions, D width of a token, E width of an
embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.bundle import SURROGATES_FILE, Bundle
from diffveil.errors import BundleError
from diffveil.noise import NoiseKey

__all__ = ["Surrogates"]

_F32: TypeAlias = NDArray[np.float32]
_MAX_BYTES = 256 << 20
_NEAREST = 6  # that one is drawn from: fewer would fit better, and be the same in every photo
_APART = 0.3  # cosine to the photo's person above which a surrogate is no stranger
_OUT = -3.0  # below every nearness
_LIKENESS = 0.5  # what a cosine of embeddings counts beside one of tokens: sex, age and skin


@dataclass(frozen=True)
class Surrogates:
    """A collection to choose from. Tokens are ``mean + coefficients · basis``.

    Tokens of faces fill few of their 10·D dimensions, so thousands of surrogates take little room.

    Attributes:
        mean: Float32 [10, D].
        basis: R orthonormal directions, float32 [R, 10, D].
        coefficients: Float32 [K, R], K at least 1.
        identities: What the bundle's recognizer sees in them, float32 [K, E], unit length.
    """

    mean: _F32
    basis: _F32
    coefficients: _F32
    identities: _F32

    @classmethod
    def load(cls, bundle: Bundle) -> Surrogates:
        """Those of a bundle that `has_surrogates`; the file holds the attributes in float16.

        Raises:
            BundleError: The bundle has none, or the file does not hold these tensors.
            BundleCorruptError: The file differs from its hash.
        """
        tensors = bundle.tensors(SURROGATES_FILE, _MAX_BYTES)
        d = bundle.dimensions
        axes = {"K": _length(tensors.get("identities")), "R": _length(tensors.get("basis"))}
        expected: dict[str, tuple[int | str, ...]] = {
            "mean": (d.stages, d.token_width),
            "basis": ("R", d.stages, d.token_width),
            "coefficients": ("K", "R"),
            "identities": ("K", d.embedding_width),
        }
        arrays: dict[str, _F32] = {}
        for name, shape in expected.items():
            tensor = tensors.get(name)
            sizes = tuple(axes[axis] if isinstance(axis, str) else axis for axis in shape)
            if tensor is None or tensor.dtype != np.float16 or tensor.shape != sizes or 0 in sizes:
                received = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise BundleError(
                    f"'{SURROGATES_FILE}': tensor '{name}': received {received}, expected "
                    f"float16 [{', '.join(map(str, shape))}] with K and R of at least 1"
                )
            arrays[name] = tensor.astype(np.float32)
        lengths = np.linalg.norm(arrays["identities"], axis=1, keepdims=True)
        finite = all(np.isfinite(array).all() for array in arrays.values())
        if not finite or not (np.abs(lengths - 1.0) < 0.01).all():
            raise BundleError(
                f"'{SURROGATES_FILE}': tensors are not finite, or identities not of unit length"
            )
        arrays["identities"] /= lengths
        return cls(**arrays)

    def __len__(self) -> int:
        return len(self.coefficients)

    def tokens(self, which: NDArray[np.intp]) -> _F32:
        """Stage tokens [N, 10, D] of some, by their numbers [N]."""
        away = self.coefficients[which] @ self.basis.reshape(len(self.basis), -1)
        tokens: _F32 = self.mean + away.reshape(len(which), *self.mean.shape)
        return tokens

    def choose(
        self,
        tokens: _F32,
        identities: _F32,
        keys: Sequence[NoiseKey],
        *,
        variants: int = 1,
        apart: bool = True,
    ) -> _F32:
        """For every face, surrogates that look like it: held, lit and coloured alike.

        One of the nearest by tokens and embedding, drawn by the face's key; for each of its
        variants another, as unlike the ones before as there are.

        Args:
            tokens: Stage tokens of the faces, float32 [N, 10, D].
            identities: Their embeddings, float32 [N, E], unit length.
            keys: Noise key of each face.
            variants: Number V.
            apart: Leave out those that the recognizer takes to be somewhat like the face's person.

        Returns:
            Tokens, float32 [N, V, 10, D].
        """
        # Less the mean: most of a token is what all faces share.
        away = (tokens - self.mean).reshape(len(tokens), -1)
        coefficients = away @ self.basis.reshape(len(self.basis), -1).T
        likeness = identities @ self.identities.T
        nearness = _directions(coefficients) @ _directions(self.coefficients).T
        nearness = nearness + np.float32(_LIKENESS) * likeness
        if apart:
            # Minus the likeness: where everyone is too alike, the least alike comes first.
            nearness = np.where(likeness > _APART, _OUT - likeness, nearness)
        rows = []
        for face, key in zip(nearness, keys, strict=True):
            nearest = np.argsort(-face, kind="stable")[:_NEAREST]
            if apart:
                strangers = nearest[face[nearest] > _OUT]
                nearest = strangers if len(strangers) else nearest[:1]
            words = key.derive("diffveil/v1/surrogate").words(len(nearest))
            first = nearest[np.argmin(words)]
            rows.append(self._unlike(first, nearest, variants))
        chosen = self.tokens(np.array(rows).reshape(-1))
        return chosen.reshape(len(tokens), variants, *self.mean.shape)

    def _unlike(self, first: np.intp, among: NDArray[np.intp], count: int) -> list[np.intp]:
        """A surrogate, and others out of some, each least like any that was chosen before."""
        chosen = [first]
        alike = self.identities[among] @ self.identities[first]
        while len(chosen) < count:
            following = among[np.argmin(alike)]
            chosen.append(following)
            alike = np.maximum(alike, self.identities[among] @ self.identities[following])
        return chosen


def _directions(vectors: _F32) -> _F32:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions: _F32 = vectors / np.maximum(lengths, np.float32(1e-6))
    return directions


def _length(tensor: NDArray[Any] | None) -> int:
    return 0 if tensor is None or not tensor.ndim else len(tensor)
