"""The face record: what it accepts, refuses and prints."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffveil.errors import OptionError
from diffveil.faces import LANDMARK_NAMES, Face, FaceDetector

POINTS = [[1.0, 2.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0], [3.0, 4.0]]


def test_json_round_trip() -> None:
    rng = np.random.default_rng(1)
    face = Face((-1.5, 2.25, 30.0, 40.5), rng.normal(20, 9, (5, 2)).round(2), 0.5)
    text = json.dumps(face.to_json())
    assert Face.from_json(json.loads(text)) == face
    assert hash(Face.from_json(json.loads(text))) == hash(face)


def test_values_are_copied_and_frozen() -> None:
    points = np.array(POINTS, dtype=np.float32)
    face = Face((0, 0, 4, 5), points)
    points[:] = 0
    assert face.landmarks.dtype == np.float64
    np.testing.assert_array_equal(face.landmarks, POINTS)
    assert (face.width, face.height, face.score) == (4.0, 5.0, 1.0)
    with pytest.raises(ValueError, match="read-only"):
        face.landmarks[0, 0] = 1
    assert len(LANDMARK_NAMES) == len(face.landmarks)


def test_equality() -> None:
    face = Face((0, 0, 4, 5), POINTS, 0.5)
    assert face == Face((0, 0, 4, 5), POINTS, 0.5)
    assert face != Face((0, 0, 4, 5), POINTS, 0.6)
    assert face != Face((0, 0, 4, 6), POINTS, 0.5)
    assert face != Face((0, 0, 4, 5), np.add(POINTS, 1), 0.5)
    assert face != "face"


@pytest.mark.parametrize(
    ("box", "landmarks", "score", "problem"),
    [
        ((0, 0, 0, 5), POINTS, 1, "box"),
        ((5, 0, 0, 5), POINTS, 1, "box"),
        ((0, 0, 4), POINTS, 1, "box"),
        ((0, 0, 4, float("nan")), POINTS, 1, "box"),
        ("no box", POINTS, 1, "box"),
        (None, POINTS, 1, "box"),
        ((0, 0, 4, 5), POINTS[:4], 1, "landmarks"),
        ((0, 0, 4, 5), [*POINTS[:4], [float("inf"), 0]], 1, "landmarks"),
        ((0, 0, 4, 5), None, 1, "landmarks"),
        ((0, 0, 4, 5), [[1], [2, 3]], 1, "landmarks"),
        ((0, 0, 4, 5), POINTS, 1.5, "score"),
        ((0, 0, 4, 5), POINTS, float("nan"), "score"),
        ((0, 0, 4, 5), POINTS, "certain", "score"),
    ],
)
def test_wrong_values(box: Any, landmarks: Any, score: Any, problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        Face(box, landmarks, score)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(OptionError, match=r"box.*landmarks.*score"):
        Face((1, 1, 1, 1), [], 2)  # type: ignore[arg-type]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)


@given(st.fixed_dictionaries({"box": json_values, "landmarks": json_values, "score": json_values}))
def test_json_of_an_app_is_a_face_or_an_option_error(value: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Face.from_json(value)


def test_json_fields() -> None:
    value = Face((0, 0, 4, 5), POINTS).to_json()
    assert set(value) == {"box", "landmarks", "score"}
    for wrong in ({**value, "name": "?"}, {"box": value["box"]}, {}):
        with pytest.raises(OptionError, match="box, landmarks"):
            Face.from_json(wrong)


def test_any_object_that_detects_is_a_detector() -> None:
    class Fixed:
        def detect(self, pixels: np.ndarray[Any, Any]) -> list[Face]:
            return []

    assert isinstance(Fixed(), FaceDetector)
    assert not isinstance(object(), FaceDetector)
