"""The library's front: whole photos in, protected photos and recovery keys out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, overload

import numpy as np
from numpy.typing import NDArray

from diffveil.align import similarity
from diffveil.batching import MAX_BATCH
from diffveil.bundle import Bundle
from diffveil.carried import anonymize_carried, recover_carried
from diffveil.engines import (
    AUTO,
    Backend,
    MemoryBudget,
    Programs,
    parse_memory,
    select_backend,
)
from diffveil.errors import OptionError
from diffveil.faces import Face, FaceDetector
from diffveil.keys import RecoveryKey
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.photos import PhotoSource, load_photo
from diffveil.plans import Preset
from diffveil.protection import Protection, protect
from diffveil.pseudonyms import People
from diffveil.recovery import recover
from diffveil.result import FaceEmbeddings, Result
from diffveil.sampling import Progress
from diffveil.scenes import (
    OnMissing,
    Scene,
    is_one_photo,
    read_scenes,
    several_photos,
    to_images,
)
from diffveil.secretkeys import Secret, secret_key

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Protector"]


class _Options(TypedDict, total=False):
    """Keyword arguments that `anonymize` and `hide` share, for type checkers."""

    variants: int
    preset: str | Preset | None
    steps: int | None
    strength: float | None
    seed: int | NoiseKey | None
    aligned: bool
    on_missing: OnMissing
    make_key: bool
    progress: Progress | None


class _AnonymizeOptions(_Options, total=False):
    """Keyword arguments of `anonymize` alone."""

    carry: bool
    secret: Secret | None
    pseudonym: Secret | None
    people: People | None


class Protector:
    """Protects faces in photos with one bundle on one backend. Safe to share between threads.

    `Protector.load()` is the usual way to get one.

    Args:
        programs: The bundle's programs on a backend.
        detector: Finds faces; by default CenterFace, loaded when first needed.
        threads: CPU threads of the default detector.
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
    ) -> Protector:
        """Open a bundle. Programs and the detector are loaded when they are first needed.

        Args:
            bundle: Folder of the bundle, or an opened one; by default the embedded one.
            backend: Name of a backend or a backend of your own. By default, and with `"auto"`, the
                fastest that this machine can use and that computes what PyTorch did on the
                bundle's golden inputs: each engine is held against them when it is loaded, and
                when one fails, then or later, the next backend takes over with a
                `BackendWarning`. A backend that is named is neither judged nor replaced.
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

    def __enter__(self) -> Protector:
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

    @overload
    def anonymize(  # type: ignore[overload-overlap]  # a str is one path, never a sequence
        self,
        source: PhotoSource,
        *,
        faces: Sequence[Face] | None = None,
        **options: Unpack[_AnonymizeOptions],
    ) -> Result: ...

    @overload
    def anonymize(
        self,
        source: Sequence[PhotoSource],
        *,
        faces: Sequence[Sequence[Face] | None] | None = None,
        **options: Unpack[_AnonymizeOptions],
    ) -> list[Result]: ...

    def anonymize(
        self,
        source: Any,
        *,
        variants: int = 1,
        preset: str | Preset | None = None,
        steps: int | None = None,
        strength: float | None = None,
        seed: int | NoiseKey | None = None,
        faces: Any = None,
        aligned: bool = False,
        on_missing: OnMissing = "error",
        make_key: bool = True,
        progress: Progress | None = None,
        carry: bool = False,
        secret: Secret | None = None,
        pseudonym: Secret | None = None,
        people: People | None = None,
    ) -> Any:
        """Replace faces by those of nobody: neither people nor machines recognise the person.

        All faces of all photos of one call go through the programs together. A result depends on
        its own photo and the options only, not on what else is in the call.

        Args:
            source: A path, a file's bytes, a Pillow image or an array uint8 [H, W, 3] RGB (see
                `diffveil.load_photo`); or a sequence of them.
            variants: Number of different results for each photo.
            preset: Name of a preset or a preset of your own; by default `"fast"`.
            steps: Sampling steps at strength 1, in place of the preset's.
            strength: How far to go from the photo, in (0, 1], in place of the preset's.
            seed: Makes results reproducible, 0 … 2**256 - 1; by default fresh randomness. Who
                knows the seed can redraw the noise, so keep it as a secret or leave it out.
            faces: The faces, if the app has found them itself; for a sequence of photos, one
                sequence of faces each, or None where they shall be detected.
            aligned: Each photo is itself one aligned face: square, with its landmarks where the
                bundle's template has them. Nothing is detected. As in any photo, only the face's
                mask changes, so the borders stay as they are.
            on_missing: What happens when a photo has no face: `"error"`, or `"keep"` it unchanged.
            make_key: Whether to make the recovery key; without, nobody gets the faces back.
            progress: Called as `progress(done, total)` after each step.
            carry: The new faces carry the old ones: no recovery key is made, and `recover_carried`
                needs the photo and the secret alone. No preset applies.
            secret: With `carry`, what recovers the photo: a passphrase, 32 random bytes or a
                `NoiseKey`.
            pseudonym: A secret (as above) under which a person becomes the same new face in every
                photo, and another under another secret. No preset applies.
            people: With `pseudonym`, the people to tell apart, by name: embeddings of each,
                float32 [E] or [K, E], as `embed` gives them. What an enrolled person becomes
                depends on name and secret. Faces that match nobody are matched with each other
                within the call, and become what the first of them decides.

        Returns:
            A result; for a sequence, a list of results in the same order.

        Raises:
            PhotoError: A photo cannot be read.
            NoFaceError: A photo has no face and `on_missing` is `"error"`. No photo is processed.
            OptionError: An argument is out of range.
            EngineError: A program cannot be loaded or failed.
        """
        if carry or pseudonym is not None:
            if variants != 1 or any(o is not None for o in (preset, steps, strength, seed)):
                raise OptionError(
                    "variants, preset, steps, strength and seed do not apply to carry and pseudonym"
                )
            if carry and pseudonym is not None:
                raise OptionError("carry and pseudonym: a face can be one of them, not both")
        if people is not None and pseudonym is None:
            raise OptionError("people: they are for pseudonym")
        if carry:
            return self._carry(secret, source, faces, aligned, on_missing, progress)
        if secret is not None:
            raise OptionError(
                "secret: it is for carry; recovery keys are sealed after they are made"
            )
        protection = Protection.choose(
            "anonymize",
            preset=preset,
            steps=steps,
            strength=strength,
            variants=variants,
            seed=seed,
            make_key=make_key,
        )
        if pseudonym is not None:
            protection = replace(protection, pseudonym=secret_key(pseudonym), people=people)
        return self._protect(protection, source, faces, aligned, on_missing, progress)

    @overload
    def hide(  # type: ignore[overload-overlap]  # a str is one path, never a sequence
        self,
        source: PhotoSource,
        *,
        faces: Sequence[Face] | None = None,
        **options: Unpack[_Options],
    ) -> Result: ...

    @overload
    def hide(
        self,
        source: Sequence[PhotoSource],
        *,
        faces: Sequence[Sequence[Face] | None] | None = None,
        **options: Unpack[_Options],
    ) -> list[Result]: ...

    def hide(
        self,
        source: Any,
        *,
        variants: int = 1,
        preset: str | Preset | None = None,
        steps: int | None = None,
        strength: float | None = None,
        seed: int | NoiseKey | None = None,
        faces: Any = None,
        aligned: bool = False,
        on_missing: OnMissing = "error",
        make_key: bool = True,
        progress: Progress | None = None,
    ) -> Any:
        """Change faces so that people do not recognise them and the bundle's recognizer does.

        `embed` of the protected photo matches `embed` of the original. Arguments, result and
        errors are those of `anonymize`.
        """
        protection = Protection.choose(
            "hide",
            preset=preset,
            steps=steps,
            strength=strength,
            variants=variants,
            seed=seed,
            make_key=make_key,
        )
        return self._protect(protection, source, faces, aligned, on_missing, progress)

    @overload
    def recover(
        self,
        photo: PhotoSource,
        key: RecoveryKey,
        *,
        reencoded: bool = False,
        progress: Progress | None = None,
    ) -> Result: ...

    @overload
    def recover(
        self,
        photo: Sequence[PhotoSource],
        key: Sequence[RecoveryKey],
        *,
        reencoded: bool = False,
        progress: Progress | None = None,
    ) -> list[Result]: ...

    def recover(
        self,
        photo: Any,
        key: Any,
        *,
        reencoded: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Put the original faces back: those that the key holds; all others stay protected.

        The backend that made the keys is used where it is among those that can run here and none
        was named; where another one runs, `Result.expected_loss` says what that costs.

        Args:
            photo: The protected photo as it was saved, or a lossless copy; or a sequence of photos.
            key: Its recovery key; or one for each photo of the sequence. Keys of several holders
                become one by `RecoveryKey.join`.
            reencoded: Accept a photo whose pixels are not those that the key belongs to, if its
                size is the same and it looks alike in coarse colours: after another lossy encoding,
                or with other faces recovered already. It is then not sure to be the same picture.
            progress: Called as `progress(done, total)` after each step.

        Returns:
            A result whose image shows the original faces; for a sequence, a list of them.

        Raises:
            PhotoError: A photo cannot be read.
            KeyMismatchError: A key belongs to another bundle or photo.
            OptionError: There is not one key for each photo, or one was wiped.
            EngineError: A program cannot be loaded or failed.
        """
        started = time.perf_counter()
        single = is_one_photo(photo)
        sources = [photo] if single else several_photos(photo)
        keys = list(key) if isinstance(key, list | tuple) else [key]
        for one in keys:
            if not isinstance(one, RecoveryKey):
                raise OptionError(
                    f"key: received {type(one).__name__}, expected a RecoveryKey; "
                    "open key files with RecoveryKey.unseal"
                )
        if len(sources) != len(keys):
            raise OptionError(
                f"key: received {len(keys)} keys for {len(sources)} photos, expected one each"
            )
        photos = [load_photo(source) for source in sources]
        operations = self._operations_for(keys)
        results = recover(
            operations, photos, keys, reencoded=reencoded, started=started, progress=progress
        )
        return results[0] if single else results

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

    def recover_carried(
        self,
        source: PhotoSource | Sequence[PhotoSource],
        secret: Secret,
        *,
        faces: Any = None,
        aligned: bool = False,
        on_missing: OnMissing = "error",
        progress: Progress | None = None,
    ) -> Any:
        """Put back the faces of photos that were anonymized with `carry`.

        Nothing in a photo says whether it carries a face, nor whether the secret is the right one:
        with another secret, or from another photo, faces of nobody come out, and no error.

        Args:
            source: The protected photo, of any size and compression; or a sequence of them.
            secret: What it was anonymized with.
            faces: As in `anonymize`, but found in the protected photo.
            aligned: As in `anonymize`.
            on_missing: As in `anonymize`.
            progress: Called after each step.

        Returns:
            A result whose image shows the original faces; for a sequence, a list of them.

        Raises:
            PhotoError: A photo cannot be read.
            NoFaceError: A photo has no face and `on_missing` is `"error"`.
            OptionError: An argument is out of range.
            EngineError: A program cannot be loaded or failed.
        """
        started = time.perf_counter()
        key = secret_key(secret)
        scenes = self._scenes(source, faces, aligned, on_missing)
        results = recover_carried(self.operations, scenes, key, started=started, progress=progress)
        return results[0] if is_one_photo(source) else results

    def _carry(
        self,
        secret: Secret | None,
        source: Any,
        faces: Any,
        aligned: bool,
        on_missing: OnMissing,
        progress: Progress | None,
    ) -> Result | list[Result]:
        if secret is None:
            raise OptionError("carry needs the secret that recovers the photo: give secret")
        started = time.perf_counter()
        key = secret_key(secret)
        scenes = self._scenes(source, faces, aligned, on_missing)
        results = anonymize_carried(
            self.operations,
            scenes,
            key,
            find=None if aligned or faces is not None else self._frames,
            started=started,
            progress=progress,
        )
        return results[0] if is_one_photo(source) else results

    def _frames(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
        """Where the detector would crop, photo to crop."""
        found = self.detector.detect(pixels)
        return [similarity(face.landmarks, self.bundle.template) for face in found]

    def _protect(
        self,
        protection: Protection,
        source: Any,
        faces: Any,
        aligned: bool,
        on_missing: OnMissing,
        progress: Progress | None,
    ) -> Result | list[Result]:
        started = time.perf_counter()
        scenes = self._scenes(source, faces, aligned, on_missing)
        results = protect(self.operations, scenes, protection, started=started, progress=progress)
        return results[0] if is_one_photo(source) else results

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
    """The programs on a named backend, or on the fastest with the others to fall back on."""
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
