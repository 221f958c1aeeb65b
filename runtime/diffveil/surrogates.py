"""Surrogates: looks of people who do not exist, for new faces to be drawn with.

A surrogate is the mean of the stage tokens of a few people who are held and lit alike (as k-Same
averages faces: Newton, Sweeney and Malin, "Preserving privacy by de-identifying face images", IEEE
TKDE 17(2), 2005, there in pixels). Conditioned on one, a face comes out whole, and as nobody; an
unconditioned one has to be made up from its surroundings. A bundle may carry a collection of them;
`diffveil_export.surrogates` makes it.

Axes: N faces, V variants of each, K surrogates, D width of a token, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffveil.bundle import SURROGATES_FILE, Bundle
from diffveil.errors import BundleError
from diffveil.noise import NoiseKey

__all__ = ["Surrogates"]

_F32: TypeAlias = NDArray[np.float32]
_MAX_BYTES = 256 << 20
_NEAREST = 6  # that one is drawn from: fewer would fit better, and be the same in every photo
_APART = 0.1  # cosine to the photo's person above which a surrogate is no stranger


@dataclass(frozen=True)
class Surrogates:
    """A collection to choose from.

    Attributes:
        tokens: Stage tokens, float32 [K, 10, D], K at least 1.
        identities: What the bundle's recognizer sees in them, float32 [K, E], unit length.
    """

    tokens: _F32
    identities: _F32
    _looks: _F32 = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_looks", self._look(self.tokens))

    @classmethod
    def load(cls, bundle: Bundle) -> Surrogates:
        """Those of a bundle that `has_surrogates`.

        The file holds ``tokens``, int8 [K, 10, D], ``scale``, float32 [K, 10], which they are
        multiplied by, and ``identities``, float16 [K, E].

        Raises:
            BundleError: The bundle has none, or the file does not hold these tensors.
            BundleCorruptError: The file differs from its hash.
        """
        tensors = bundle.tensors(SURROGATES_FILE, _MAX_BYTES)
        d = bundle.dimensions
        scale = tensors.get("scale")
        count = 0 if scale is None or not scale.ndim else len(scale)
        expected = {
            "tokens": (np.int8, (count, d.stages, d.token_width)),
            "scale": (np.float32, (count, d.stages)),
            "identities": (np.float16, (count, d.embedding_width)),
        }
        for name, (dtype, shape) in expected.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.dtype != dtype or tensor.shape != shape or not count:
                received = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise BundleError(
                    f"'{SURROGATES_FILE}': tensor '{name}': received {received}, expected "
                    f"{np.dtype(dtype)} {['K', *shape[1:]]}, K ≥ 1 everywhere the same"
                )
        tokens = tensors["tokens"].astype(np.float32) * tensors["scale"][:, :, None]
        identities = tensors["identities"].astype(np.float32)
        lengths = np.linalg.norm(identities, axis=1, keepdims=True)
        if not np.isfinite(tokens).all() or not (np.abs(lengths - 1.0) < 0.01).all():
            raise BundleError(
                f"'{SURROGATES_FILE}': tokens are not finite, or identities not of unit length"
            )
        return cls(tokens, identities / lengths)

    def __len__(self) -> int:
        return len(self.tokens)

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

        One of the nearest by tokens, drawn by the face's key; another for each of its variants, as
        far as there are more.

        Args:
            tokens: Stage tokens of the faces, float32 [N, 10, D].
            identities: Their embeddings, float32 [N, E], unit length.
            keys: Noise key of each face.
            variants: Number V.
            apart: Leave out those that the recognizer takes to be somewhat like the face's person.

        Returns:
            Tokens, float32 [N, V, 10, D].
        """
        nearness = self._look(tokens) @ self._looks.T
        if apart:
            likeness = identities @ self.identities.T
            # Minus the likeness: where everyone is too alike, the least alike comes first.
            nearness = np.where(likeness > _APART, -2.0 - likeness, nearness)
        rows = []
        for face, key in zip(nearness, keys, strict=True):
            nearest = np.argsort(-face, kind="stable")[:_NEAREST]
            if apart:
                strangers = nearest[face[nearest] > -2.0]
                nearest = strangers if len(strangers) else nearest[:1]
            words = key.derive("diffveil/v1/surrogate").words(len(nearest))
            order = np.argsort(words, kind="stable")
            rows.append([nearest[order[v % len(nearest)]] for v in range(variants)])
        chosen: _F32 = self.tokens[np.array(rows)]
        return chosen

    def _look(self, tokens: _F32) -> _F32:
        """Unit vectors [N, 10·D] whose cosines say how alike tokens look."""
        # Less the mean: most of a token is what all faces share.
        apart = (tokens - self.tokens.mean(axis=0)).reshape(len(tokens), -1)
        lengths = np.linalg.norm(apart, axis=1, keepdims=True)
        looks: _F32 = (apart / np.maximum(lengths, 1e-6)).astype(np.float32)
        return looks
