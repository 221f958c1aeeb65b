"""Rates by the attributes that a data set's labels give, and by how far heads are turned."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.protocol.people import Portrait
from benchmarks.protocol.verification import Rate, wilson
from diffveil.masks import turn

__all__ = ["SMALL", "breakdown", "labels_of", "read_attributes"]

#: Groups of fewer faces are marked: their rates say little.
SMALL = 30

_MOST_VALUES = 12  # an attribute of more is a number or a name, no group
_TURNED = 0.15  # of the eyes' distance: where the nose leaves their middle visibly

Attributes = dict[str, dict[str, str]]


def read_attributes(path: Path) -> Attributes:
    """Labels of a CSV file: a column `file` (`person/photo.jpg`) or `person`, others attributes.

    Returns:
        For each file or person its attributes; empty cells are left out.

    Raises:
        ValueError: Neither column is there.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        key = next((name for name in ("file", "person") if name in (rows.fieldnames or ())), None)
        if key is None:
            raise ValueError(f"{path.name}: expected a column `file` or `person`")
        return {
            row[key]: {n: v for n, v in row.items() if n and n not in ("file", "person") and v}
            for row in rows
        }


def labels_of(portrait: Portrait, attributes: Attributes) -> dict[str, str]:
    """A portrait's attributes by its file, else by its person, and `head`: turned or frontal."""
    found = dict(attributes.get(portrait.file) or attributes.get(portrait.person) or {})
    aside = abs(turn(portrait.face.landmarks))
    return {**found, "head": "turned" if aside > _TURNED else "frontal"}


def breakdown(
    labels: list[dict[str, str]], people: list[str], outcomes: Mapping[str, NDArray[np.bool_]]
) -> list[dict[str, Any]]:
    """Rates of every group.

    Args:
        labels: Attributes of each portrait, length N.
        people: Person of each.
        outcomes: By name, what happened to each portrait, [N].

    Returns:
        A row a group: `attribute`, `value`, `faces`, `people`, `small`, and `rates` with Wilson's
        intervals for as many trials as there are people.
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, own in enumerate(labels):
        for attribute, value in own.items():
            groups[attribute, value].append(index)
    values = defaultdict(set)
    for attribute, value in groups:
        values[attribute].add(value)
    rows = []
    for (attribute, value), members in sorted(groups.items()):
        if len(values[attribute]) > _MOST_VALUES:
            continue
        count = len({people[i] for i in members})
        rates = {}
        for name, outcome in outcomes.items():
            share = float(outcome[members].mean())
            rates[name] = Rate(share, *wilson(share, count), len(members)).to_json()
        rows.append(
            {
                "attribute": attribute,
                "value": value,
                "faces": len(members),
                "people": count,
                "small": len(members) < SMALL,
                "rates": rates,
            }
        )
    return rows
