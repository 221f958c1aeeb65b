"""Contact sheets and histograms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.protocol.judges import Judge
from benchmarks.protocol.people import Portrait

__all__ = ["contact_sheet", "draw_cosines", "one_a_person", "sheets"]

_COLUMNS = 8
_PEOPLE = 24


def one_a_person(portraits: list[Portrait], count: int = _PEOPLE) -> list[Portrait]:
    """The first portrait of every person; further ones if there are fewer people."""
    by_person: dict[str, Portrait] = {}
    for portrait in portraits:
        by_person.setdefault(portrait.person, portrait)
    first = list(by_person.values())
    return [*first, *(p for p in portraits if p not in first)][:count]


def contact_sheet(
    portraits: list[Portrait], operations: list[str], template: Any, size: int
) -> Image.Image:
    """Aligned faces of different people, eight a line; below one another what became of each.

    Args:
        portraits: The first of every person is shown, of 24 people.
        operations: Names of outputs, a row each.
        template: Landmarks in the crops, [5, 2].
        size: Side of a face in pixels.
    """
    shown, lines = one_a_person(portraits), []
    for start in range(0, len(shown), _COLUMNS):
        part = shown[start : start + _COLUMNS]
        for operation in operations:
            line = np.concatenate([p.crop(operation, template, size) for p in part], 1)
            below = 8 if operation == operations[-1] else 2
            missing = size * min(_COLUMNS, len(shown)) - line.shape[1]
            lines.append(np.pad(line, ((0, below), (0, missing), (0, 0)), constant_values=255))
    return Image.fromarray(np.concatenate(lines))


def sheets(
    portraits: list[Portrait], operations: list[str], template: Any, size: int, folder: Path
) -> None:
    """Write `sheet-OPERATION.png` for each: original faces above, the results below them."""
    for operation in operations:
        sheet = contact_sheet(portraits, ["original", operation], template, size)
        sheet.save(folder / f"sheet-{operation}.png")


def draw_cosines(judges: list[Judge], operations: list[str], far: float, path: Path) -> None:
    """Histograms of the cosine of every output to its own original, one panel a recognizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(judges), 1, figsize=(9, 2.8 * len(judges)), constrained_layout=True, squeeze=False
    )
    bins = np.linspace(-0.6, 1.0, 65)
    for axis, judge in zip(axes[:, 0], judges, strict=True):
        axis.hist(
            judge.gallery.impostors, bins, density=True, color="0.8", label="different people"
        )
        for operation in operations:
            own = (judge.vectors[operation] * judge.vectors["original"]).sum(1)
            axis.hist(own, bins, density=True, histtype="step", linewidth=1.6, label=operation)
        axis.axvline(judge.gallery.threshold(far), color="black", linewidth=1, linestyle=":")
        axis.set_title(f"{judge.name} ({judge.kind}); dotted: FAR {far:.0%}", fontsize=10)
        axis.set_yticks([])
    axes[-1, 0].set_xlabel("cosine to the same photo's original")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
