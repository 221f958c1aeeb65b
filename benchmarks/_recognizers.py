"""Face recognizers to measure with: ONNX or TorchScript files, none of them shipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ARCFACE_TEMPLATE", "load_recognizer"]

#: ArcFace's five points (x, y) in a 112×112 crop: eyes, nose, mouth corners, image-left first.
ARCFACE_TEMPLATE = np.array(
    [(38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20)]
)

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def load_recognizer(path: Path, batch: int = 32) -> Embed:
    """Open a recognizer of ArcFace-aligned faces, RGB 0…255 float [N, 3, 112, 112].

    Returns:
        A function from uint8 crops [N, 112, 112, 3] RGB to float32 unit embeddings [N, E].

    Raises:
        ValueError: If the file is neither `.onnx` nor TorchScript (`.pt`).
    """
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.asarray(session.run(None, {name: pixels})[0], np.float32)

    elif path.suffix in {".pt", ".ts"}:
        import torch

        load: Any = torch.jit.load  # has no types
        module = torch.jit.freeze(load(str(path), map_location="cpu").eval())

        def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
            with torch.no_grad():
                output: NDArray[np.float32] = module(torch.from_numpy(pixels)).float().numpy()
                return output

    else:
        raise ValueError(f"{path.name}: expected an .onnx or TorchScript .pt file")

    def embed(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(crops), batch):
            part = crops[start : start + batch].transpose(0, 3, 1, 2).astype(np.float32)
            parts.append(run(np.ascontiguousarray(part)))
        out = np.concatenate(parts)
        unit: NDArray[np.float32] = out / np.linalg.norm(out, axis=1, keepdims=True)
        return unit

    return embed
