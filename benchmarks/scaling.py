"""Time and memory against one size at a time, in a process of their own.

    python -m benchmarks.scaling AXIS [--bundle DIR] [--threads N] [--seconds N]

AXIS is `faces` of a photo, `megapixels` of a photo with one face, `batch` of aligned faces, or CPU
`threads`. Prints a JSON object a size: `size`, `seconds` of every turn, `peak_mib` (the most memory
that the process held during one call; null where the system does not say). Sizes take turns; memory
is measured afterwards, from the smallest up.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from examples.demo import carried_photo
from PIL import Image

import diffveil
from benchmarks._timing import clock, in_turns
from diffveil.align import crop_face, similarity
from diffveil.engines import ONNXRuntimeCPU
from diffveil.noise import NoiseKey
from diffveil.presets import PRESETS
from diffveil.scenes import to_images

__all__ = ["AXES", "peak_of", "points"]

_SIDE = 1024
_ROW = 8
"""Faces in a row of the photo of many faces."""

Calls = dict[float, Callable[[], object]]


class _Subject:
    """The protector that is measured, and one face for it.

    Args:
        bundle: Folder of the bundle; None is the embedded one.
        threads: CPU threads.
    """

    def __init__(self, bundle: Path | None, threads: int) -> None:
        self._bundle = bundle
        self.protector = self.with_threads(threads)
        with Image.open(carried_photo("astronaut")) as image:
            self.photo = image.convert("RGB")
        pixels = np.asarray(self.photo)
        (self.face,) = self.protector.detector.detect(pixels)
        template = self.protector.bundle.template
        size = self.protector.bundle.image_size
        self.crop = crop_face(pixels, similarity(self.face.landmarks, template), size)

    def with_threads(self, threads: int) -> diffveil.Protector:
        """The same bundle with so many threads."""
        return diffveil.Protector.load(self._bundle, backend="cpu", threads=threads)


def _faces(subject: _Subject, sizes: tuple[float, ...]) -> Calls:
    """So many faces in a photo of 1024² pixels; they are named, so nothing is detected."""
    canvas = Image.new("RGB", (_SIDE, _SIDE), "grey")
    tile, faces = _SIDE // _ROW, []
    crop, template = Image.fromarray(subject.crop), subject.protector.bundle.template
    scale = tile / crop.width
    for index in range(int(max(sizes))):
        left, top = tile * (index % _ROW), tile * (index // _ROW)
        canvas.paste(crop.resize((tile, tile)), (left, top))
        box = (float(left), float(top), float(left + tile), float(top + tile))
        landmarks = np.asarray(template) * scale + (left, top)
        faces.append(diffveil.Face(box, landmarks, 1.0))
    pixels = np.asarray(canvas)
    run = partial(subject.protector.anonymize, pixels, seed=1, make_key=False)
    return {size: partial(run, faces=faces[: int(size)]) for size in sizes}


def _megapixels(subject: _Subject, sizes: tuple[float, ...]) -> Calls:
    """The same photo with one face at other resolutions, detection included."""
    calls: Calls = {}
    for size in sizes:
        side = round(1000 * size**0.5)
        pixels = np.asarray(subject.photo.resize((side, side)))
        calls[size] = partial(subject.protector.anonymize, pixels, seed=1, make_key=False)
    return calls


def _batch(subject: _Subject, sizes: tuple[float, ...]) -> Calls:
    """Aligned faces in one call."""
    return {size: _anonymize(subject.protector, subject.crop, int(size)) for size in sizes}


def _threads(subject: _Subject, sizes: tuple[float, ...]) -> Calls:
    """Eight aligned faces in one call, with so many threads."""
    return {size: _anonymize(subject.with_threads(int(size)), subject.crop, 8) for size in sizes}


def _anonymize(protector: diffveil.Protector, crop: Any, count: int) -> Callable[[], object]:
    images = to_images(np.repeat(crop[None], count, 0))
    keys = [NoiseKey.from_seed(index) for index in range(count)]
    # One draw each: more of them would be a face's luck, not growth.
    plan = replace(PRESETS["fast"].anonymize, redraws=0)
    return partial(protector.operations.anonymize, images, plan, keys=keys)


AXES: Mapping[str, tuple[tuple[float, ...], Callable[[_Subject, tuple[float, ...]], Calls]]] = (
    MappingProxyType(
        {
            "faces": ((1, 2, 4, 8, 16, 32), _faces),
            "megapixels": ((0.25, 1, 4, 16), _megapixels),
            "batch": ((1, 2, 4, 8, 16, 32), _batch),
            "threads": ((1, 2, 4, 8), _threads),
        }
    )
)
"""Sizes and what makes the calls, by name. Threads beyond the CPUs there are, are left out."""


def points(axis: str, bundle: Path | None, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Measure along one axis.

    Args:
        axis: One of `AXES`.
        bundle: Folder of the bundle; None is the embedded one.
        threads: CPU threads, but along `threads`.
        seconds: Time to spend on all sizes.

    Returns:
        For each size `size`, `seconds` of every turn, and `peak_mib`.
    """
    sizes, make = AXES[axis]
    if axis == "threads":
        most = ONNXRuntimeCPU().options().intra_op_num_threads
        sizes = tuple(size for size in sizes if size <= most)
    calls = make(_Subject(bundle, threads), sizes)
    times = in_turns({str(s): clock(call) for s, call in calls.items()}, seconds, fewest=3)
    return [
        {"size": size, "seconds": times[str(size)].tolist(), "peak_mib": peak_of(call)}
        for size, call in calls.items()
    ]


def peak_of(call: Callable[[], object]) -> float | None:
    """Most memory in MiB that this process held during a call; None where Linux does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
        call()
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def main(arguments: list[str] | None = None) -> int:
    """Print the points of one axis."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("axis", choices=AXES)
    parser.add_argument("--bundle", type=Path, help="default: the embedded one")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, help="default: %(default)g")
    args = parser.parse_args(arguments)
    for point in points(args.axis, args.bundle, args.threads, args.seconds):
        print(json.dumps(point))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
