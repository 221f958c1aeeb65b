"""Face verification and closed-set identification, with confidence intervals over people.

Photos of one person resemble one another, so photos are no independent trials: intervals are 95 %
percentiles of a bootstrap that draws *people* with replacement and sets the threshold anew in each
draw (Bolle, Ratha and Pankanti, "Error analysis of pattern recognition systems: the subsets
bootstrap", CVIU 93, 2004). Where all trials agree, and every draw with them, the interval is
Wilson's for as many trials as there are people (JASA 22, 1927).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Gallery", "Rate", "wilson"]

Array = NDArray[np.float32]

_Z = 1.959963984540054  # two-sided 95 %


@dataclass(frozen=True)
class Rate:
    """A share of trials with its 95 % interval; NaN when there was no trial."""

    value: float
    low: float
    high: float
    trials: int

    def to_json(self) -> dict[str, float | int]:
        """Plain numbers."""
        return {"value": self.value, "low": self.low, "high": self.high, "trials": self.trials}


def wilson(share: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of independent trials."""
    if trials == 0:
        return float("nan"), float("nan")
    z2 = _Z * _Z / trials
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z * float(np.sqrt(share * (1 - share) / trials + z2 / (4 * trials))) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


class Gallery:
    """Originals of known people, the impostor pairs among them, and probes against them.

    Args:
        embeddings: Unit embeddings [M, E] of original photos.
        people: Person of each, length M.
        draws: Bootstrap draws.
        seed: Of the draws.

    Raises:
        ValueError: Fewer than two people, so that there are no impostors.
    """

    def __init__(
        self, embeddings: Array, people: list[str], *, draws: int = 1000, seed: int = 0
    ) -> None:
        self.embeddings = embeddings
        self.names, self.labels = np.unique(people, return_inverse=True)
        if len(self.names) < 2:
            raise ValueError("a gallery needs at least two people")
        first, second = np.triu_indices(len(people), 1)
        apart = self.labels[first] != self.labels[second]
        first, second = first[apart], second[apart]
        scores = np.einsum("ie,ie->i", embeddings[first], embeddings[second])
        order = np.argsort(-scores, kind="stable")
        self.impostors: Array = scores[order]  # falling
        self._pair_people = self.labels[first[order]], self.labels[second[order]]
        rng = np.random.default_rng(seed)
        count = len(self.names)
        self._weights = rng.multinomial(count, np.full(count, 1 / count), size=draws)
        self._drawn: dict[float, Array] = {}

    def ordered(self, order: NDArray[np.intp]) -> Gallery:
        """The same gallery, its rows in another order."""
        gallery = copy.copy(self)
        gallery.embeddings, gallery.labels = self.embeddings[order], self.labels[order]
        return gallery

    def threshold(self, far: float) -> float:
        """Cosine above which a share `far` of the originals' impostor pairs is accepted."""
        return float(np.quantile(self.impostors, 1 - far))

    def drawn_thresholds(self, far: float) -> Array:
        """The threshold of every bootstrap draw, [draws]."""
        if far not in self._drawn:
            a, b = self._pair_people
            limits = []
            for weights in self._weights:
                running = np.cumsum(weights[a] * weights[b])  # of each person drawn so often
                at = int(np.searchsorted(running, far * running[-1], side="right"))
                limits.append(self.impostors[min(at, len(running) - 1)])
            self._drawn[far] = np.array(limits, np.float32)
        return self._drawn[far]

    def matched(self, probes: Array, rows: NDArray[np.intp], far: float) -> NDArray[np.bool_]:
        """Whether each probe is accepted as its own original, [N]; arguments as `rates`."""
        own = np.einsum("ne,ne->n", probes, self.embeddings[rows])
        accepted: NDArray[np.bool_] = own > self.threshold(far)
        return accepted

    def rates(
        self, probes: Array, rows: NDArray[np.intp], fars: tuple[float, ...]
    ) -> dict[str, Any]:
        """Verification and identification of probes.

        Args:
            probes: Unit embeddings [N, E] of protected or recovered photos.
            rows: The gallery's row of each probe's own original, [N].
            fars: False accept rates at which thresholds are set.

        Returns:
            For every rate `same_photo` (each probe against its own original) and `other_photos`
            (against the person's other originals); `rank1`: the nearest original is the person's,
            its own photo left out; and `cosine`, the mean against its own original.
        """
        scores = probes @ self.embeddings.T
        own = scores[np.arange(len(rows)), rows].copy()
        who = self.labels[rows]
        same = who[:, None] == self.labels[None, :]
        same[np.arange(len(rows)), rows] = False
        trial, other = np.nonzero(same)
        pairs = scores[trial, other]
        found: dict[str, Any] = {"cosine": float(own.mean()), "at": {}}
        for far in fars:
            fixed, drawn = self.threshold(far), self.drawn_thresholds(far)
            found["at"][f"{far:g}"] = {
                "threshold": fixed,
                "same_photo": self._accepted(own, who, fixed, drawn).to_json(),
                "other_photos": self._accepted(pairs, who[trial], fixed, drawn).to_json(),
            }
        known = same.any(1)  # a person of one photo cannot be found again
        scores[np.arange(len(rows)), rows] = -2
        hits = self.labels[scores.argmax(1)] == who
        found["rank1"] = self._accepted(
            hits[known].astype(np.float32), who[known], 0.5, np.full(len(self._weights), 0.5)
        ).to_json()
        return found

    def _accepted(
        self,
        scores: NDArray[np.floating[Any]],
        who: NDArray[np.intp],
        threshold: float,
        drawn: NDArray[np.floating[Any]],
    ) -> Rate:
        """Share of scores above a threshold, and its interval over people."""
        if not len(scores):
            return Rate(float("nan"), float("nan"), float("nan"), 0)
        value = float((scores > threshold).mean())
        shares = []
        people = len(self.names)
        trials = np.bincount(who, minlength=people)
        for weights, limit in zip(self._weights, drawn, strict=True):
            total = weights @ trials
            if total:
                hits = np.bincount(who[scores > limit], minlength=people)
                shares.append(float(weights @ hits) / float(total))
        low, high = np.quantile(shares, [0.025, 0.975])
        if low == high:
            low, high = wilson(value, len(np.unique(who)))
        # A draw repeats people and so may disagree with all of them by a rounding.
        return Rate(value, min(float(low), value), max(float(high), value), len(scores))
