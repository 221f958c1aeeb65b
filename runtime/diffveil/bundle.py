"""Reading a bundle: a folder with `bundle.json` and the files that it lists.

The manifest is read first and strictly (size capped before reading, unknown fields refused, every
size and path checked) and nothing else is opened until something needs it. A file's hash is
checked when the file is first used. `diffveil_export.bundle_writer` writes what this module reads.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffveil._manifest import FileEntry, Manifest, ProgramEntry, parse_manifest
from diffveil.errors import BundleCorruptError, BundleError
from diffveil.programs import JOINED_LATER, Dimensions

__all__ = [
    "CONSTANTS_FILE",
    "GOLDEN_FILE",
    "MANIFEST_FILE",
    "SURROGATES_FILE",
    "Bundle",
    "embedded_bundle_path",
]

MANIFEST_FILE = "bundle.json"
CONSTANTS_FILE = "constants.safetensors"
GOLDEN_FILE = "golden.safetensors"
SURROGATES_FILE = "surrogates.safetensors"
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_CONSTANTS_BYTES = 64 << 20
_CHUNK = 1 << 20
_NEVER_RECOVER = frozenset({"denoise_few", *JOINED_LATER})


def embedded_bundle_path() -> Path:
    """Folder of the bundle that ships inside the package."""
    return Path(__file__).parent / "bundles" / "reference-128"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Holds its manifest; programs are loaded by engines.

    Attributes:
        path: The bundle's folder.
        manifest: What `bundle.json` states, checked.
    """

    path: Path
    manifest: Manifest
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Bundle:
        """Open the bundle in folder `path`, or the embedded one.

        Raises:
            BundleError: The folder or its manifest is missing or malformed.
            BundleVersionError: The manifest's version is not one that this diffveil reads.
            BundleCorruptError: A listed file is missing or has another size than stated.
        """
        folder = embedded_bundle_path() if path is None else Path(path)
        file = folder / MANIFEST_FILE
        try:
            with file.open("rb") as stream:
                raw = stream.read(_MAX_MANIFEST_BYTES + 1)
        except OSError as error:
            raise BundleError(
                f"no bundle at '{folder}': cannot read '{MANIFEST_FILE}' ({error.strerror}); "
                "give the folder that `diffveil export` wrote"
            ) from error
        if len(raw) > _MAX_MANIFEST_BYTES:
            raise BundleError(f"'{file}' is larger than {_MAX_MANIFEST_BYTES} bytes: no manifest")
        try:
            content = json.loads(raw, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"'{file}' is not valid JSON: {error}") from error
        bundle = cls(path=folder, manifest=parse_manifest(content))
        bundle.verify()
        return bundle

    @property
    def name(self) -> str:
        """Name of the model, for people."""
        return self.manifest.name

    @property
    def dimensions(self) -> Dimensions:
        """Sizes of the fixed axes of every program."""
        return self.manifest.dimensions

    @property
    def image_size(self) -> int:
        """Side S of a face crop in pixels."""
        return self.manifest.dimensions.image_size

    @property
    def template(self) -> NDArray[np.float64]:
        """Where the five landmarks lie in a crop: float64 [5, 2], x and y in pixels."""
        return np.array(self.manifest.template, dtype=np.float64)

    @property
    def thresholds(self) -> Mapping[str, float]:
        """Cosine above which two faces match, by false accept rate (`far_1e-2`, …)."""
        return self.manifest.thresholds

    @property
    def has_golden(self) -> bool:
        """Whether it carries inputs and what PyTorch computed for them; see `diffveil.golden`."""
        return GOLDEN_FILE in self.manifest.files

    @property
    def has_surrogates(self) -> bool:
        """Whether it carries looks to draw new faces with; see `diffveil.surrogates`."""
        return SURROGATES_FILE in self.manifest.files

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hex, of everything that decides what a recovery key decodes to.

        It covers the hashes of programs, weights and constants and the noise schedule, not names,
        licences or parity records: those may be corrected without orphaning keys. Nor does it cover
        `denoise_few`, `guide_latent`, `assess`, `step` and the surrogates, which recovery never
        needs: they may join later.
        """
        m = self.manifest
        programs = {name: p for name, p in m.programs.items() if name not in _NEVER_RECOVER}
        weights = {data for program in programs.values() for data in program.data}
        covered = {
            "programs": {name: program.file.sha256 for name, program in programs.items()},
            "files": {name: m.files[name].sha256 for name in weights | {CONSTANTS_FILE}},
            "schedule": [m.schedule.steps, m.schedule.beta_start, m.schedule.beta_end],
            "prediction": m.prediction,
        }
        canonical = json.dumps(covered, sort_keys=True, separators=(",", ":")).encode()
        return hashlib.sha256(b"diffveil/v1/bundle\0" + canonical).hexdigest()

    @cached_property
    def unconditional(self) -> NDArray[np.float32]:
        """Conditioning of the empty prompt: float32 [1, T, W].

        Raises:
            BundleError: The constants file does not hold this tensor in this shape.
            BundleCorruptError: The constants file differs from its hash.
        """
        tensor = self.tensors(CONSTANTS_FILE, _MAX_CONSTANTS_BYTES).get("unconditional")
        d = self.dimensions
        expected = (1, d.conditioning_length, d.conditioning_width)
        if tensor is None or tensor.shape != expected or tensor.dtype != np.float32:
            received = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise BundleError(
                f"'{CONSTANTS_FILE}': tensor 'unconditional': received {received}, "
                f"expected float32 {list(expected)}"
            )
        tensor.setflags(write=False)
        result: NDArray[np.float32] = tensor
        return result

    def tensors(self, name: str, max_bytes: int) -> dict[str, NDArray[Any]]:
        """Contents of a listed safetensors file, after checking its size and hash.

        Raises:
            BundleError: The bundle has no such file, or it is too large or no such file at all.
            BundleCorruptError: The file differs from its hash, or cannot be read.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"bundle '{self.name}' has no file '{name}'")
        if entry.bytes > max_bytes:
            raise BundleError(f"'{name}' is larger than {max_bytes} bytes")
        # Late: `import diffveil` must stay light.
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            raw = (self.path / name).read_bytes()
        except OSError as error:
            raise BundleCorruptError(
                f"bundle file '{name}' cannot be read ({error.strerror})"
            ) from error
        _check_hash(name, hashlib.sha256(raw).hexdigest(), entry)
        try:
            return dict(load(raw))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise BundleError(f"'{name}' is not a safetensors file: {error}") from error

    def program(self, name: str) -> ProgramEntry:
        """The manifest's entry of program `name`.

        Raises:
            BundleError: There is no such program.
        """
        try:
            return self.manifest.programs[name]
        except KeyError:
            known = ", ".join(self.manifest.programs)
            raise BundleError(
                f"bundle '{self.name}' has no program '{name}'; programs: {known}"
            ) from None

    def program_path(self, name: str) -> Path:
        """Path of a program's ONNX file, after checking it and its weights against their hashes.

        Raises:
            BundleError: There is no such program.
            BundleCorruptError: A file is missing or differs from its hash.
        """
        entry = self.program(name)
        for file in (entry.file, *(self.manifest.files[data] for data in entry.data)):
            self._verify_file(file)
        return self.path / entry.file.name

    def verify(self, *, full: bool = False) -> None:
        """Check every listed file's presence and size, and with `full` its hash.

        Raises:
            BundleCorruptError: A file is missing, or differs from the manifest.
        """
        for entry in self.manifest.all_files():
            path = self.path / entry.name
            try:
                size = path.stat().st_size
                inside = path.resolve().is_relative_to(self.path.resolve())
            except OSError as error:
                raise BundleCorruptError(
                    f"bundle file '{entry.name}' cannot be read ({error.strerror}); "
                    "copy the whole bundle folder again"
                ) from error
            if not inside or not path.is_file():
                raise BundleCorruptError(
                    f"bundle file '{entry.name}' is not a plain file inside the bundle folder"
                )
            if size != entry.bytes:
                raise BundleCorruptError(
                    f"bundle file '{entry.name}': received {size} bytes, "
                    f"expected {entry.bytes}; copy the whole bundle folder again"
                )
            if full:
                self._verify_file(entry, again=True)

    def _verify_file(self, entry: FileEntry, *, again: bool = False) -> None:
        with self._lock:
            if entry.name in self._verified and not again:
                return
            digest = hashlib.sha256()
            try:
                with (self.path / entry.name).open("rb") as stream:
                    while chunk := stream.read(_CHUNK):
                        digest.update(chunk)
            except OSError as error:
                raise BundleCorruptError(
                    f"bundle file '{entry.name}' cannot be read ({error.strerror})"
                ) from error
            _check_hash(entry.name, digest.hexdigest(), entry)
            self._verified.add(entry.name)


def _check_hash(name: str, received: str, entry: FileEntry) -> None:
    if received != entry.sha256:
        raise BundleCorruptError(
            f"bundle file '{name}': received SHA-256 {received[:16]}…, "
            f"expected {entry.sha256[:16]}…; copy the whole bundle folder again"
        )


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a field appears twice")
    return result
