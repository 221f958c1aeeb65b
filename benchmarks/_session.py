"""What all cases of the benchmark share: where results go, how long to measure, and photos."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from examples.demo import carried_photo
from numpy.typing import NDArray
from PIL import Image

import diffveil
from benchmarks._results import Recorder
from benchmarks._timing import Times, ratios
from diffveil.align import crop_face, similarity
from diffveil.scenes import to_images

__all__ = ["OURS", "Session"]

OURS = "diffveil"
"""Provider of everything that the runtime does, followed by its backend."""


@dataclass
class Session:
    """One run of the benchmark.

    Attributes:
        recorder: Where results go.
        folder: A folder of its own for files that cases need.
        seconds: Time to spend on each comparison.
        fewest: Turns that are taken however long they last.
        threads: CPU threads of ours and of PyTorch.
        bundle: Folder of the bundle; None is the embedded one.
        quick: Whether to leave out what takes minutes.
    """

    recorder: Recorder
    folder: Path
    seconds: float
    fewest: int
    threads: int
    bundle: Path | None = None
    quick: bool = False

    @cached_property
    def protector(self) -> diffveil.Protector:
        """The bundle on the CPU."""
        return diffveil.Protector.load(self.bundle, backend="cpu", threads=self.threads)

    @property
    def provider(self) -> str:
        """Name of ours in results."""
        return f"{OURS} {self.protector.backend}"

    def photo(self, name: str) -> NDArray[np.uint8]:
        """A photo that a package carries, `astronaut` or `group`: uint8 [H, W, 3]."""
        with Image.open(carried_photo(name)) as image:
            return np.asarray(image.convert("RGB"))

    @cached_property
    def face(self) -> NDArray[np.uint8]:
        """The astronaut's face as the bundle frames it: uint8 [S, S, 3]."""
        photo, bundle = self.photo("astronaut"), self.protector.bundle
        (face,) = self.protector.detector.detect(photo)
        return crop_face(photo, similarity(face.landmarks, bundle.template), bundle.image_size)

    def crops(self, count: int) -> NDArray[np.float32]:
        """So many faces for `FaceOperations`: float32 [N, 3, S, S] in [-1, 1]."""
        return to_images(np.repeat(self.face[None], count, 0))

    def folder_of_photos(self, count: int) -> Path:
        """A folder of so many JPEG files, the two photos by turns."""
        folder = self.folder / f"photos-{count}"
        if not folder.exists():
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = self.photo(("astronaut", "group")[index % 2])
                Image.fromarray(pixels).save(folder / f"{index:03}.jpg", quality=95)
        return folder

    def fresh(self, name: str) -> Path:
        """An empty folder to write into."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def keep(
        self,
        case: str,
        times: Mapping[str, Times],
        *,
        base: str | None = None,
        faces: int = 1,
        per: str = "face",
        **config: Any,
    ) -> None:
        """Keep the milliseconds a face of ways that took turns, and how many times those of `base`.

        Args:
            case: The case.
            times: Seconds of every turn by provider.
            base: The provider whose time the others' is divided by.
            faces: Faces of one call.
            per: What there were `faces` of.
            **config: Configuration of the case.
        """
        config = {f"{per}s": faces, **config}
        for provider, seconds in times.items():
            each = 1000 * seconds / faces
            self.recorder.add(case, provider, f"time a {per}", "ms", each, **config)
        for provider, ratio in ratios(times, base).items() if base else ():
            self.recorder.add(case, provider, f"time over {base}", "×", ratio, **config)

    def say(self, text: str) -> None:
        """Tell what begins."""
        print(text, file=sys.stderr, flush=True)
