"""What the detectors share: sessions, scaling a photo to a network's input, suppression."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffveil.errors import BackendUnavailableError, EngineError, OptionError
from diffveil.faces import Face

__all__ = ["DetectorSession", "check_pixels", "read_model", "scaled_input", "suppress"]

_MAX_MODEL_BYTES = 256 * 2**20


class DetectorSession:
    """A detection network in ONNX Runtime on the CPU.

    Args:
        model: Serialized ONNX model.
        label: What to call it in errors.
        threads: Number of threads; None takes the CPUs that this process may use.

    Raises:
        BackendUnavailableError: ONNX Runtime is not installed.
        EngineError: The model cannot be loaded.
        OptionError: `threads` is below 1.
    """

    def __init__(self, model: bytes, label: str, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise OptionError(f"threads: received {threads}, expected at least 1")
        if find_spec("onnxruntime") is None:
            raise BackendUnavailableError(
                f"{label} needs onnxruntime: pip install 'diffveil[faces]'"
            )
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = threads or _usable_cpus()
        # Photos differ in size: an arena would keep the peak of every size, and a spinning thread
        # would take the processor from the programs that follow.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._label = label
        try:
            self._session: Any = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's classes share no public base
            raise EngineError(f"{label}: the model cannot be loaded ({error})") from error
        self._input: str = self._session.get_inputs()[0].name
        self.outputs: list[str] = [output.name for output in self._session.get_outputs()]

    def run(self, image: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Outputs by name for one input [1, 3, h, w]."""
        try:
            values = self._session.run(self.outputs, {self._input: image})
        except Exception as error:  # as above
            raise EngineError(f"{self._label}: the model cannot be run ({error})") from error
        return dict(zip(self.outputs, values, strict=True))


def _usable_cpus() -> int:
    """CPUs that this process may run on; ONNX Runtime's own default ignores container limits."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def read_model(path: str | os.PathLike[str], label: str) -> bytes:
    """A model file's bytes.

    Raises:
        BackendUnavailableError: There is no such file.
        EngineError: The file is too large to be a detector.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_MODEL_BYTES:
            raise EngineError(f"{label}: {file} is too large for a detector")
        return file.read_bytes()
    except OSError as error:
        raise BackendUnavailableError(
            f"{label}: {file} cannot be read: {error.strerror}"
        ) from error


def check_pixels(pixels: NDArray[np.uint8]) -> None:
    """Refuse what is not a photo.

    Raises:
        OptionError: Not uint8 [H, W, 3], or empty.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise OptionError(
            f"pixels: received {pixels.dtype} {list(pixels.shape)}, expected uint8 [H, W, 3] RGB"
        )


def scaled_input(
    pixels: NDArray[np.uint8], longer_side: float, multiple: int = 32
) -> tuple[NDArray[np.float32], tuple[float, float]]:
    """Scale a photo for a network whose input sides are multiples of `multiple`.

    Args:
        pixels: uint8 [H, W, 3], RGB.
        longer_side: Wanted length of the longer side in pixels.
        multiple: What the network's total stride divides; the rest is filled with black.

    Returns:
        float32 [1, 3, h, w], RGB, 0 … 255, and the exact factors (x, y) from photo to input.
    """
    height, width = pixels.shape[:2]
    factor = longer_side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    image = Image.fromarray(pixels)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    padded = np.zeros(
        (1, 3, -(-size[1] // multiple) * multiple, -(-size[0] // multiple) * multiple), np.float32
    )
    padded[0, :, : size[1], : size[0]] = np.asarray(image).transpose(2, 0, 1)
    return padded, (size[0] / width, size[1] / height)


def suppress(faces: list[Face], overlap: float) -> list[Face]:
    """Greedy non-maximum suppression.

    Args:
        faces: Candidates in any order.
        overlap: Of two faces, the less certain is dropped when the intersection exceeds this share
            of their union, or when their landmarks nearly coincide.

    Returns:
        The survivors, the most certain first.
    """
    waiting = sorted(faces, key=lambda face: -face.score)
    if not waiting:
        return []
    boxes = np.array([face.box for face in waiting])
    points = np.array([face.landmarks for face in waiting])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive = np.ones(len(waiting), dtype=bool)
    kept = []
    for index, face in enumerate(waiting):
        if not alive[index]:
            continue
        kept.append(face)
        low = np.maximum(boxes[:, :2], boxes[index, :2])
        high = np.minimum(boxes[:, 2:], boxes[index, 2:])
        shared = np.prod(np.maximum(high - low, 0.0), axis=1)
        union = areas + areas[index] - shared
        # The same face seen at two scales can have boxes of different size, but one nose.
        distance = np.linalg.norm(points - points[index], axis=2).mean(axis=1)
        same = distance < 0.2 * np.sqrt(areas[index])
        alive &= ~((shared > overlap * union) | same)
    return kept
