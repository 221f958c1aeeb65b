"""recover and recover_carried: the verbs that put original faces back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, overload

from diffveil.carried import recover_carried
from diffveil.errors import OptionError
from diffveil.faces import Face
from diffveil.keys import RecoveryKey
from diffveil.photos import PhotoSource, load_photo
from diffveil.protector._base import Workbench
from diffveil.recovery import recover
from diffveil.result import Result
from diffveil.sampling import Progress
from diffveil.scenes import OnMissing, is_one_photo, several_photos
from diffveil.secretkeys import SecretSource, secret_key

__all__ = ["Recovers"]


class Recovers(Workbench):
    """Puts original faces back, from recovery keys or from the photos themselves."""

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
    def recover_carried(  # type: ignore[overload-overlap]  # a str is one path, never a sequence
        self,
        source: PhotoSource,
        secret: SecretSource,
        *,
        faces: Sequence[Face] | None = None,
        aligned: bool = False,
        on_missing: OnMissing = "error",
        progress: Progress | None = None,
    ) -> Result: ...

    @overload
    def recover_carried(
        self,
        source: Sequence[PhotoSource],
        secret: SecretSource,
        *,
        faces: Sequence[Sequence[Face] | None] | None = None,
        aligned: bool = False,
        on_missing: OnMissing = "error",
        progress: Progress | None = None,
    ) -> list[Result]: ...

    def recover_carried(
        self,
        source: Any,
        secret: SecretSource,
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
