"""Attackers: what counts as a match, what a linear map learns, and which pairs are compared."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.adversary import as_markdown, attacks, greyed, linear_map, rates, unit
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def test_rates_leave_out_what_is_not_a_number() -> None:
    scores = np.array([[np.nan, 0.9, 0.1], [0.2, np.nan, 0.3], [0.4, 0.1, np.nan]], np.float32)
    same = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    rate, threshold = rates(scores, same, far=0.0)
    assert threshold == pytest.approx(0.4)
    assert rate == 0.5  # 0.9 is accepted, 0.2 is not


def test_a_linear_map_undoes_a_linear_disguise() -> None:
    rng = np.random.default_rng(3)
    meant = unit(rng.standard_normal((300, 16)).astype(np.float32))
    disguise = rng.standard_normal((16, 16)).astype(np.float32)
    seen = unit(meant @ disguise)
    found = unit(seen[200:] @ linear_map(seen[:200], meant[:200], ridge=1e-3))
    assert (found * meant[200:]).sum(1).mean() > 0.9


def test_attackers_win_where_faces_are_only_rotated_and_lose_where_they_are_replaced() -> None:
    rng = np.random.default_rng(4)
    width, people = 24, [f"{i // 3}" for i in range(60)]
    identity = rng.standard_normal((20, width))[np.arange(60) // 3]
    turn, _ = np.linalg.qr(rng.standard_normal((width, width)))

    def portraits(clean: NDArray[np.float64]) -> NDArray[np.uint8]:
        noisy = clean + 0.2 * rng.standard_normal(clean.shape)
        return np.clip(128 + 30 * noisy, 0, 255).astype(np.uint8).reshape(-1, 2, width // 6, 3)

    def embed(crops: NDArray[np.uint8]) -> F32:
        return unit(crops.reshape(len(crops), -1).astype(np.float32) - 128)

    strangers = rng.standard_normal((400, width))
    rotated = {
        "original": portraits(identity),
        "anonymized": portraits(identity @ turn),
        "purified": portraits(identity @ turn),
        "train original": portraits(strangers),
        "train anonymized": portraits(strangers @ turn),
    }
    found = {name: row["tar"] for name, row in attacks(embed, rotated, people).items()}
    assert found["originals, other photos"] > 0.95
    assert found["match, other photos"] < 0.2
    assert found["link"] > 0.95
    assert found["learn, other photos"] > 0.9

    replaced = dict(rotated)
    for name in ("anonymized", "purified", "train anonymized"):
        replaced[name] = portraits(rng.standard_normal((len(rotated[name]), width)))
    found = {name: row["tar"] for name, row in attacks(embed, replaced, people).items()}
    assert max(rate for name, rate in found.items() if "originals" not in name) < 0.2


def test_the_table_names_every_attack() -> None:
    rows = {"match": {"tar": 0.0125, "threshold": 0.3}, "link": {"tar": 0.5, "threshold": 0.4}}
    report = {
        "faces": 80,
        "people": 40,
        "preset": "fast",
        "train_faces": 300,
        "recognizers": {"a": {"ours": rows, "grey": {"link": rows["link"]}}},
    }
    text = as_markdown(report)
    assert "| attack | a: ours | a: grey |" in text
    assert "| match | 1.2% |  |" in text
    assert "| link | 50.0% | 50.0% |" in text


def test_grey_covers_the_face_and_nothing_else() -> None:
    crops = np.random.default_rng(5).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    mask = np.zeros((4, 4), np.float32)
    mask[1:3, 1:3] = 1
    covered = greyed(crops, mask)
    assert (covered[:, 1:3, 1:3] == 127).all()
    np.testing.assert_array_equal(covered[:, 0], crops[:, 0])
