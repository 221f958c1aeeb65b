"""YuNet (Wu, Peng and Yu, "YuNet: A Tiny Millisecond-level Face Detector", Machine Intelligence
Research 20, 2023): a third of a megabyte. The file is the app's to bring, for example from the
OpenCV model zoo (Apache-2.0), with dynamic input size."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from diffveil.detectors._base import (
    DetectorSession,
    check_pixels,
    read_model,
    scaled_input,
    suppress,
)
from diffveil.errors import EngineError, OptionError
from diffveil.faces import Face

__all__ = ["YuNet"]

_STRIDES = (8, 16, 32)


class YuNet:
    """Finds faces with YuNet; see `diffveil.faces.FaceDetector`.

    Args:
        session: The network.
        threshold: Least confidence, 0 … 1.
        longer_side: Length in pixels to which the photo's longer side is reduced, if it is longer.
    """

    def __init__(
        self, session: DetectorSession, *, threshold: float = 0.6, longer_side: int = 1280
    ) -> None:
        if not 0.0 < threshold < 1.0:
            raise OptionError(f"threshold: received {threshold}, expected between 0 and 1")
        if not 32 <= longer_side <= 8192:
            raise OptionError(f"longer_side: received {longer_side}, expected 32 … 8192 pixels")
        expected = {f"{kind}_{s}" for kind in ("cls", "obj", "bbox", "kps") for s in _STRIDES}
        if set(session.outputs) != expected:
            raise EngineError(
                f"YuNet: the model's outputs are {sorted(session.outputs)}, "
                f"expected {sorted(expected)}"
            )
        self._session = session
        self._threshold = threshold
        self._longer_side = longer_side

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        threshold: float = 0.6,
        longer_side: int = 1280,
    ) -> YuNet:
        """Load the network from a file with dynamic input size.

        Raises:
            BackendUnavailableError: The file or ONNX Runtime is missing.
            EngineError: The file is not YuNet.
        """
        session = DetectorSession(read_model(path, "YuNet"), "YuNet", threads)
        return cls(session, threshold=threshold, longer_side=longer_side)

    def detect(self, pixels: NDArray[np.uint8], /) -> list[Face]:
        """Find all faces, the most certain first.

        Args:
            pixels: uint8 [H, W, 3], RGB, upright.

        Raises:
            OptionError: `pixels` is not such an array.
            EngineError: The network fails.
        """
        check_pixels(pixels)
        image, factors = scaled_input(pixels, min(self._longer_side, max(pixels.shape[:2])))
        outputs = self._session.run(np.ascontiguousarray(image[:, ::-1]))  # trained on BGR
        return suppress(decode(outputs, image.shape[3], self._threshold, factors), overlap=0.4)


def decode(
    outputs: Mapping[str, NDArray[np.float32]],
    width: int,
    threshold: float,
    factors: tuple[float, float],
) -> list[Face]:
    """Faces from the network's per-cell predictions, relative to the cells' corners.

    Args:
        outputs: For each stride n: "cls_n" and "obj_n" [1, N, 1], 0 … 1; "bbox_n" [1, N, 4]
            (centre x, y in cells, log width, log height); "kps_n" [1, N, 10] (x, y in cells).
        width: Of the network's input in pixels.
        threshold: Least confidence, the geometric mean of the two probabilities.
        factors: (x, y) from photo to network input, pixels to pixels.
    """
    faces = []
    per_pixel = np.array(factors, dtype=np.float64)
    for stride in _STRIDES:
        probability = outputs[f"cls_{stride}"][0, :, 0].clip(0, 1) * outputs[f"obj_{stride}"][
            0, :, 0
        ].clip(0, 1)
        scores = np.sqrt(probability)
        for cell in np.flatnonzero(scores > threshold):
            corner = np.array([cell % (width // stride), cell // (width // stride)], np.float64)
            box = outputs[f"bbox_{stride}"][0, cell].astype(np.float64)
            points = outputs[f"kps_{stride}"][0, cell].astype(np.float64).reshape(5, 2)
            centre, half = (corner + box[:2]) * stride, np.exp(box[2:]) * stride / 2.0
            low, high = (centre - half) / per_pixel - 0.5, (centre + half) / per_pixel - 0.5
            if not (np.isfinite([*low, *high]).all() and np.isfinite(points).all()):
                continue
            if (high - low > 1.0).all():
                landmarks = (corner + points) * stride / per_pixel - 0.5
                faces.append(Face((*low, *high), landmarks, float(scores[cell])))
    return faces
