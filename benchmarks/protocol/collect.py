"""All tables of the quality protocol, from portraits that have been protected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import diffveil
from benchmarks.protocol.baselines import BASELINES
from benchmarks.protocol.groups import Attributes, breakdown, labels_of
from benchmarks.protocol.judges import Judge
from benchmarks.protocol.keys_and_variants import diversity, wrong_keys
from benchmarks.protocol.people import Portrait
from benchmarks.protocol.pictures import draw_cosines, one_a_person, sheets
from benchmarks.protocol.robustness import protection_under, recovery_under, refused_as_cut
from diffveil.keys import RecoveryKey
from diffveil.presets import preset as preset_named

__all__ = ["FARS", "KINDS", "collect", "draw_baselines", "pictures", "verification"]

FARS = (0.01, 0.001)
#: What is compared with the originals, in the order of tables.
KINDS = ("anonymize", "hide", "recover", *BASELINES)

_DISTURBED = ("original", "anonymize", "hide")


def draw_baselines(portraits: list[Portrait]) -> None:
    """Fill the outputs of the baselines."""
    for portrait in portraits:
        for name, draw in BASELINES.items():
            portrait.outputs[name] = draw(portrait.pixels, portrait.face)


def verification(judges: list[Judge], faces: int) -> list[dict[str, Any]]:
    """A row a recognizer: rates of the first `faces` of the gallery and of what became of them."""
    own = np.arange(faces)
    return [
        {
            "recognizer": judge.name,
            "kind": judge.kind,
            "gallery": len(judge.gallery.embeddings),
            "impostor_pairs": len(judge.gallery.impostors),
            **{k: judge.gallery.rates(judge.vectors[k], own, FARS) for k in ("original", *KINDS)},
        }
        for judge in judges
    ]


def collect(
    protector: diffveil.Protector,
    portraits: list[Portrait],
    keys: list[RecoveryKey],
    judges: list[Judge],
    *,
    preset: str,
    attributes: Attributes,
    few: int,
) -> Iterator[tuple[str, Any]]:
    """Verification, groups, robustness, wrong keys and diversity, each when it is done.

    Args:
        protector: What protected them.
        portraits: With all outputs; first in the judges' galleries.
        keys: Recovery keys of the anonymized ones.
        judges: Recognizers that have looked; the bundle's own last.
        preset: What they were protected with.
        attributes: Labels by file or person.
        few: Faces, each of another person, for what runs the model again.

    Yields:
        Name and content of a section of the report.
    """
    far, plans = FARS[0], preset_named(preset)
    outside = judges[:-1] or judges
    people = [p.person for p in portraits]
    yield "verification", verification(judges, len(portraits))
    labels = [labels_of(p, attributes) for p in portraits]
    yield "groups", breakdown(labels, people, _outcomes(outside, len(portraits), far))

    shown = one_a_person(portraits, few)
    rows = [portraits.index(p) for p in shown]
    chosen = [judge.of_the_first(rows) for judge in outside]
    template, size = np.asarray(protector.bundle.template), protector.bundle.image_size
    crops = np.stack([p.crop("original", template, size) for p in shown])
    yield "keys", wrong_keys(protector, crops, [people[r] for r in rows], chosen, plans, far)
    yield "diversity", diversity(protector, crops, chosen, plans, far)
    own_keys, judge = [keys[r] for r in rows], chosen[-1]
    yield (
        "recovery",
        {
            "faces": len(shown),
            "judge": judge.name,
            "refused_of_another_size": refused_as_cut(protector, shown, own_keys),
            "under": recovery_under(protector, shown, own_keys, judge, far),
        },
    )
    yield (
        "robustness",
        {j.name: protection_under(portraits, j, _DISTURBED, far) for j in strangers_of(outside)},
    )


def strangers_of(judges: list[Judge]) -> list[Judge]:
    """The independent ones, or all where there is none."""
    return [j for j in judges if j.independent] or judges


def _outcomes(judges: list[Judge], faces: int, far: float) -> dict[str, Any]:
    """What counts for each face: matched by any independent recognizer, and kept by all."""
    judges = strangers_of(judges)
    own = np.arange(faces)
    hits = {
        kind: np.stack([j.gallery.matched(j.vectors[kind], own, far) for j in judges])
        for kind in ("anonymize", "hide", "recover")
    }
    return {
        "anonymize": hits["anonymize"].any(0),
        "hide": hits["hide"].all(0),
        "recover": hits["recover"].all(0),
    }


def pictures(
    protector: diffveil.Protector, portraits: list[Portrait], judges: list[Judge], folder: Path
) -> None:
    """Contact sheets, an operation each, and `cosines.png`."""
    template, size = np.asarray(protector.bundle.template), protector.bundle.image_size
    sheets(portraits, list(KINDS), template, size, folder)
    draw_cosines(judges, list(KINDS), FARS[0], folder / "cosines.png")
