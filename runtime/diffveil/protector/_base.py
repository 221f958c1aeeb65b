"""What a protector holds, whatever it is asked: programs, operations and a detector."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffveil.align import similarity
from diffveil.batching import MAX_BATCH
from diffveil.bundle import Bundle
from diffveil.engines import (
    AUTO,
    Backend,
    MemoryBudget,
    Programs,
    parse_memory,
    select_backend,
)
from diffveil.faces import FaceDetector
from diffveil.keys import RecoveryKey
from diffveil.operations import FaceOperations
from diffveil.scenes import OnMissing, Scene, is_one_photo, read_scenes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Workbench"]


class Workbench:
    """Programs of one bundle on one backend, and a detector; each loaded when first needed.

    Arguments are those of `Protector`.
    """

    def __init__(
        self,
        programs: Programs,
        *,
        detector: FaceDetector | None = None,
        threads: int | None = None,
    ) -> None:
        self.programs = programs
        self.bundle = programs.bundle
        self.operations = FaceOperations(programs)
        self._detector = detector
        self._threads = threads
        self._elsewhere: dict[str, FaceOperations | None] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | Bundle | None = None,
        *,
        backend: str | Backend | None = None,
        detector: FaceDetector | None = None,
        threads: int | None = None,
        verify: bool = False,
        max_memory: int | str | None = None,
    ) -> Self:
        """Open a bundle. Programs and the detector are loaded when they are first needed.

        Args:
            bundle: Folder of the bundle, or an opened one; by default the embedded one.
            backend: Name of a backend or a backend of your own. By default, and with `"auto"`, the
                first, in the expected order of speed, that this machine can use and that computes
                what PyTorch did on the bundle's golden inputs: each engine is held against them
                when it is loaded, and when one fails, then or later, the next backend takes over
                with a `BackendWarning`. A backend that is named is neither judged nor replaced.
            detector: Finds faces; by default CenterFace, which needs `diffveil[faces]`.
            threads: CPU threads of one program call; by default the CPUs this process may use. A
                backend or detector of your own keeps its own setting.
            verify: Run every program once on the bundle's golden inputs now, on the reference
                backend too, and refuse a backend that computes something else than the exporter's
                PyTorch did.
            max_memory: Memory for the programs, in bytes or such as `"1.5GiB"`: as many faces
                go through them at once as fit by the bundle's own counts, and programs that are
                not needed at the moment are unloaded. It is an estimate for one call at a time,
                without the detector and what libraries take for themselves.

        Raises:
            BundleError: The bundle is missing, malformed or incomplete.
            BackendUnavailableError: No backend can be used, or not the one asked for.
            EngineError: `verify` found a difference; the message names program and output.
            OptionError: There is no backend of that name, `threads` is below one, or not even one
                face fits into `max_memory`.
        """
        if bundle is None or isinstance(bundle, str | os.PathLike):
            bundle = Bundle.load(None if bundle is None else os.fspath(bundle))
        budget = None
        if max_memory is not None:
            budget = MemoryBudget.plan(bundle, parse_memory(max_memory), MAX_BATCH)
        if backend is None or isinstance(backend, str):
            programs = _programs(bundle, backend or AUTO, threads, verify, budget)
        else:
            programs = _named(bundle, backend, verify, budget)
        return cls(programs, detector=detector, threads=threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the programs; later calls raise `EngineError`."""
        self.programs.close()
        with self._lock:
            others, self._elsewhere = self._elsewhere, {}
        for operations in others.values():
            if operations is not None:
                operations.programs.close()

    @property
    def backend(self) -> str:
        """Name of the backend."""
        return self.programs.backend.name

    @property
    def backend_reason(self) -> str:
        """Why it is that backend, in words."""
        return self.programs.why

    @property
    def detector(self) -> FaceDetector:
        """What finds faces; the default one is loaded here.

        Raises:
            BackendUnavailableError: The default detector is not installed.
        """
        with self._lock:
            if self._detector is None:
                # Late: callers that bring faces or a detector do not need the extra.
                from diffveil.detectors import CenterFace

                self._detector = CenterFace.load(threads=self._threads)
            return self._detector

    def _frames(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
        """Where the detector would crop, photo to crop."""
        found = self.detector.detect(pixels)
        return [similarity(face.landmarks, self.bundle.template) for face in found]

    def _operations_for(self, keys: Sequence[RecoveryKey]) -> FaceOperations:
        """The operations on the backend that made the keys, or the usual ones."""
        made_by = {key.backend for key in keys}
        if len(made_by) != 1 or made_by == {self.backend}:
            return self.operations
        (name,) = made_by
        with self._lock:
            if name not in self._elsewhere:
                programs = self.programs.preferring(name, "it made the key")
                self._elsewhere[name] = None if programs is None else FaceOperations(programs)
            return self._elsewhere[name] or self.operations

    def _scenes(self, source: Any, faces: Any, aligned: bool, on_missing: OnMissing) -> list[Scene]:
        """Photos of a call with their faces: one source, or several."""
        if is_one_photo(source):
            source, faces = [source], None if faces is None else [faces]
        return read_scenes(
            source,
            faces,
            detect=lambda pixels: self.detector.detect(pixels),
            aligned=aligned,
            on_missing=on_missing,
            template=self.bundle.template,
            size=self.bundle.image_size,
        )


def _programs(
    bundle: Bundle, name: str, threads: int | None, verify: bool, budget: MemoryBudget | None
) -> Programs:
    """The programs on a named backend, or on the first that can run and those to fall back on."""
    if name != AUTO:
        chosen = select_backend(name, bundle, threads=threads).require()
        return _named(bundle, chosen, verify, budget)
    from diffveil.golden import examiner, judge_for

    judge = judge_for(bundle) if verify else None
    selection = select_backend(AUTO, bundle, threads=threads, judge=judge)
    return Programs(
        bundle,
        selection.require(),
        others=selection.others,
        examine=examiner(bundle),
        why=selection.why,
        budget=budget,
    )


def _named(bundle: Bundle, backend: Backend, verify: bool, budget: MemoryBudget | None) -> Programs:
    if verify:
        from diffveil.golden import require_golden

        require_golden(bundle, backend)
    return Programs(bundle, backend, budget=budget)
