"""Pairs of protected and original faces for an attacker to learn from, made once and kept.

A folder holds `original.npy` and one file a protection, uint8 [N, S, S, 3] each, and `pairs.json`:
what they were made of and how many are done, so that making them can be broken off and taken up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.protocol.people import SUFFIXES, Pixels, Portrait, central_face
from diffveil.faces import FaceDetector
from diffveil.photos import load_photo

__all__ = ["Protection", "make_pairs", "training_files"]

#: Portraits, and the index of the first (for seeds), to their protected photos.
Protection = Callable[[list[Portrait], int], list[Pixels]]


def training_files(root: Path, judged: set[str], count: int, seed: int = 0) -> list[Path]:
    """Up to `count` photos below a folder, mixed, without those of people who are judged.

    Args:
        root: Searched with all its subfolders.
        judged: Names of people's folders; a photo below a folder of such a name is left out.
        count: How many at most.
        seed: Of the mixing.
    """
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in SUFFIXES and not judged & set(path.relative_to(root).parent.parts)
    ]
    order = np.random.default_rng(seed).permutation(len(files))
    return [files[i] for i in order[:count]]


def make_pairs(
    folder: Path,
    files: list[Path],
    protections: Mapping[str, Protection],
    detector: FaceDetector,
    frame: tuple[NDArray[np.float64], int],
    *,
    made_with: Mapping[str, Any],
    batch: int = 8,
    note: Callable[[str], None] = lambda _: None,
    more: Callable[[], bool] = lambda: True,
) -> dict[str, Pixels]:
    """Originals and what each protection makes of them, aligned; takes up what a folder holds.

    Args:
        folder: Where the pairs lie.
        files: Photos; those without a face become no pair.
        protections: By name.
        detector: Finds the faces.
        frame: Template [5, 2] and side in pixels of the aligned crops.
        made_with: Whatever else the pairs depend on, as plain JSON.
        batch: Photos protected at a time; a broken-off run loses at most so many.
        note: Told how far it is.
        more: Asked before each batch; False stops early, with the pairs made so far.

    Returns:
        uint8 [N, S, S, 3] by name, `original` among them.

    Raises:
        ValueError: The folder holds pairs made of other photos or in another way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    template, size = frame
    state_file, names = folder / "pairs.json", ["original", *protections]
    digest = hashlib.sha256("\n".join(map(str, files)).encode()).hexdigest()
    made = {"files": digest, "size": size, "names": names, **made_with}
    state: dict[str, Any] = {"made": made, "read": 0, "pairs": 0}
    if state_file.exists():
        state = json.loads(state_file.read_text())
        if state["made"] != made:
            raise ValueError(
                f"{folder}: holds pairs that were made otherwise; remove it or name another folder"
            )
    mode = "r+" if state["read"] else "w+"
    shape = (len(files), size, size, 3)
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode, np.uint8, shape)
        for name in names
    }
    while state["read"] < len(files) and more():
        part: list[Portrait] = []
        for path in files[state["read"] : state["read"] + batch]:
            pixels = load_photo(path).pixels
            face = central_face(pixels, detector)
            if face is not None:
                part.append(Portrait(path.parent.name, pixels, face))
        rows = slice(state["pairs"], state["pairs"] + len(part))
        if part:
            arrays["original"][rows] = [p.crop("original", template, size) for p in part]
            for name, protect in protections.items():
                for portrait, pixels in zip(part, protect(part, rows.start), strict=True):
                    portrait.outputs[name] = pixels
                arrays[name][rows] = [p.crop(name, template, size) for p in part]
        state["read"] = min(state["read"] + batch, len(files))
        state["pairs"] = rows.stop
        for array in arrays.values():
            array.flush()
        _replace(state_file, json.dumps(state))
        note(f"{state['read']}/{len(files)} training photos")
    return {name: array[: state["pairs"]] for name, array in arrays.items()}


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    temporary.replace(path)
