from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diffveil.align import similarity, template_for
from diffveil.frames import Frame
from diffveil.photos import Photo
from diffveil.scenes import aligned_scene
from fake_photos import face_at

FRAMES = st.builds(
    Frame, st.integers(-3, 90), st.integers(-3, 90), st.integers(-14, 3), st.integers(-8, 8)
)
SIZES = st.tuples(st.integers(60, 4000), st.integers(60, 4000))


@given(FRAMES, SIZES)
def test_a_frame_is_nearest_to_itself(frame: Frame, size: tuple[int, int]) -> None:
    assert Frame.nearest(frame.matrix(size, 128), size, 128) == frame
    assert Frame.nearest(frame.matrix(size, 512), size, 512) == frame


@given(FRAMES, st.lists(st.floats(-0.45, 0.45), min_size=4, max_size=4))
def test_a_detectors_error_does_not_matter(frame: Frame, off: list[float]) -> None:
    photo, size = (600, 800), 128
    exact = frame.matrix(photo, size)
    middle = np.full(2, 63.5)
    step = size / 12 / np.sqrt(np.linalg.det(exact[:, :2]))  # between frames, photo pixels
    centre = np.linalg.solve(exact[:, :2], middle - exact[:, 2]) + np.array(off[2:]) * step
    scale, angle = 1.2 ** off[0], np.deg2rad(10.0) * off[1]
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[c, -s], [s, c]]) @ exact[:, :2]
    matrix = np.concatenate([turn, (middle - turn @ centre)[:, None]], axis=1)
    assert Frame.nearest(matrix, photo, size) == frame
    worst = max(map(abs, off))
    assert Frame.within(matrix, photo, size, worst + 1e-6) == frame
    if worst > 1e-3:
        assert Frame.within(matrix, photo, size, worst - 1e-6) is None


@given(FRAMES, st.sampled_from([0.5, 0.75, 2.0]))
def test_scaling_the_photo_leaves_it(frame: Frame, factor: float) -> None:
    size = (800, 1200)
    matrix = frame.matrix(size, 128)
    other = matrix.copy()
    other[:, :2] /= factor
    # Pixel centres: x + ½ scales.
    other[:, 2] = matrix[:, 2] + matrix[:, :2] @ np.full(2, 0.5 / factor - 0.5)
    scaled = round(size[0] * factor), round(size[1] * factor)
    assert Frame.nearest(other, scaled, 128) == frame
    np.testing.assert_allclose(frame.matrix(scaled, 128), other, atol=1e-6)


def test_the_nearest_come_first_and_differ() -> None:
    size = (480, 640)
    matrix = similarity(face_at(300, 200, 140, turn=0.1).landmarks, template_for(128))
    frames = list(Frame.near(matrix, size, 128))
    assert len(frames) == len(set(frames)) == 16
    assert frames[0] == Frame.nearest(matrix, size, 128)
    corners = np.array([[0, 0, 1], [127, 0, 1], [64, 127, 1]], dtype=float)
    there = np.linalg.inv(np.vstack([matrix, [0, 0, 1]])) @ corners.T
    away = np.abs(frames[0].matrix(size, 128) @ there - corners[:, :2].T).max()
    assert away < 30  # pixels of 128: half a step of each kind at once


def test_an_aligned_photo_lies_on_the_grid() -> None:
    for side in (97, 160, 512):
        photo = Photo(np.zeros((side, side, 3), dtype=np.uint8))
        (matrix,) = aligned_scene(photo, template_for(128), 128).matrices
        frame = Frame.nearest(matrix, (side, side), 128)
        assert frame == Frame(6, 6, 0, 0)
        np.testing.assert_allclose(frame.matrix((side, side), 128), matrix, atol=1e-9)


def test_indices_are_distinct_and_not_negative() -> None:
    assert min(Frame(-5, -1, -20, -9).indices) >= 0
    assert Frame(1, 2, 3, 4).indices != Frame(2, 1, 3, 4).indices
