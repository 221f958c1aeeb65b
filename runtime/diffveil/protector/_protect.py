"""anonymize and hide: the verbs that change faces."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict, overload

from diffveil.carried import anonymize_carried
from diffveil.errors import OptionError
from diffveil.faces import Face
from diffveil.noise import NoiseKey
from diffveil.photos import PhotoSource
from diffveil.plans import Preset
from diffveil.protection import Protection, protect
from diffveil.protector._base import Workbench
from diffveil.pseudonyms import People
from diffveil.result import Result
from diffveil.sampling import Progress
from diffveil.scenes import OnMissing, is_one_photo
from diffveil.secretkeys import SecretSource, secret_key

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Protects"]


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
    secret: SecretSource | None
    pseudonym: SecretSource | None
    people: People | None


class Protects(Workbench):
    """Changes the faces of photos."""

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
        secret: SecretSource | None = None,
        pseudonym: SecretSource | None = None,
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

    def _carry(
        self,
        secret: SecretSource | None,
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
