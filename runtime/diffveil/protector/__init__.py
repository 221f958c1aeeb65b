"""The library's front: whole photos in, protected photos and recovery keys out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from diffveil.faces import Face
from diffveil.photos import PhotoSource
from diffveil.protector._protect import Protects
from diffveil.protector._recover import Recovers
from diffveil.result import FaceEmbeddings
from diffveil.scenes import OnMissing, is_one_photo, to_images

__all__ = ["Protector"]


class Protector(Protects, Recovers):
    """Protects faces in photos with one bundle on one backend. Safe to share between threads.

    `Protector.load()` is the usual way to get one.

    Args:
        programs: The bundle's programs on a backend.
        detector: Finds faces; by default CenterFace, loaded when first needed.
        threads: CPU threads of the default detector.
    """

    @overload
    def embed(  # type: ignore[overload-overlap]  # a str is one path, never a sequence
        self,
        source: PhotoSource,
        *,
        faces: Sequence[Face] | None = None,
        aligned: bool = False,
        on_missing: OnMissing = "error",
    ) -> FaceEmbeddings: ...

    @overload
    def embed(
        self,
        source: Sequence[PhotoSource],
        *,
        faces: Sequence[Sequence[Face] | None] | None = None,
        aligned: bool = False,
        on_missing: OnMissing = "error",
    ) -> list[FaceEmbeddings]: ...

    def embed(
        self,
        source: Any,
        *,
        faces: Any = None,
        aligned: bool = False,
        on_missing: OnMissing = "error",
    ) -> Any:
        """What an authorised recognizer sees: the identity embedding of every face.

        Use it to match hidden faces with enrolled ones. Arguments and errors are those of
        `anonymize`.

        Returns:
            Faces and their embeddings; for a sequence, a list of them.
        """
        scenes = self._scenes(source, faces, aligned, on_missing)
        width = self.bundle.dimensions.embedding_width
        vectors = np.empty((0, width), dtype=np.float32)
        crops = [scene.crops for scene in scenes if scene.faces]
        if crops:
            vectors = self.operations.embed(to_images(np.concatenate(crops)))
        ends = np.cumsum([len(scene.faces) for scene in scenes])
        found = [
            FaceEmbeddings(scene.faces, vectors[end - len(scene.faces) : end].copy())
            for scene, end in zip(scenes, ends, strict=True)
        ]
        return found[0] if is_one_photo(source) else found
