"""Writing a bundle: a staged folder that appears whole or not at all, and its manifest.

`diffveil.bundle` reads what this module writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffveil._manifest import FORMAT, VERSION, Cost, ParityEntry
from diffveil.bundle import MANIFEST_FILE, Bundle
from diffveil.errors import OptionError
from diffveil.programs import STAGES, Dimensions, ProgramSpec
from diffveil_export.components import Components

__all__ = [
    "ProgramFacts",
    "copy_bundle",
    "digest",
    "enter_program",
    "staged_folder",
    "tensor_entries",
    "write_json",
    "write_manifest",
]


@dataclass(frozen=True)
class ProgramFacts:
    """What the manifest states of one program beside its tensors.

    Attributes:
        data: Names of its weight files.
        parity: How far it was from PyTorch.
        precision: Type that it computes in.
        loss_scale: See `diffveil._manifest.ProgramEntry`.
        cost: Operations and bytes.
        parts: Programs that it was composed of.
    """

    data: tuple[str, ...]
    parity: tuple[ParityEntry, ...] = ()
    precision: str = "float32"
    loss_scale: float | None = None
    cost: Cost | None = None
    parts: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """As they stand in the manifest; what is not known is left out."""
        fields: dict[str, Any] = {
            "data": list(self.data),
            "parity": [asdict(entry) for entry in self.parity],
            "precision": self.precision,
        }
        if self.loss_scale is not None:
            fields["loss_scale"] = self.loss_scale
        if self.cost is not None:
            fields["cost"] = asdict(self.cost)
        if self.parts:
            fields["parts"] = list(self.parts)
        return fields


@contextmanager
def staged_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well.

    Args:
        target: Folder to create.
        force: Replace a bundle that is already there.

    Raises:
        OptionError: `target` exists and is not to be replaced, or is not a bundle.
    """
    _refuse_existing(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{target.name}-", ignore_cleanup_errors=True
    ) as workspace:
        stage = Path(workspace) / "new"
        stage.mkdir()
        yield stage
        _refuse_existing(target, force)  # an export takes minutes: look again
        old = Path(workspace) / "old"
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(stage, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _refuse_existing(target: Path, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise OptionError(f"'{target}' exists; give --force to replace it")
    # --force replaces a bundle, never somebody's photos.
    if target.is_symlink() or not (target / MANIFEST_FILE).is_file():
        raise OptionError(f"'{target}' exists and is no bundle: remove it yourself")


def copy_bundle(bundle: Bundle, folder: Path, *, without: Iterable[str] = ()) -> None:
    """Copy a bundle's manifest and listed files, but for some; engines built from it stay."""
    names = {file.name for file in bundle.manifest.all_files()} | {MANIFEST_FILE}
    for name in sorted(names - set(without)):
        shutil.copyfile(bundle.path / name, folder / name)


def write_manifest(
    folder: Path,
    components: Components,
    *,
    facts: Mapping[str, ProgramFacts],
    provenance: Mapping[str, str],
) -> None:
    """Write `bundle.json` for the files in `folder`; the same files give the same bytes.

    Args:
        folder: Holds `<program>.onnx` for every program, their data and constants.
        components: The model.
        facts: What else to state, by program.
        provenance: Added to the model's own.
    """
    d = components.dimensions
    onnx_files = {f"{name}.onnx" for name in facts}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": components.name,
        "image_size": d.image_size,
        "latent": {"channels": d.latent_channels, "size": d.latent_size},
        "tokens": {"stages": STAGES, "width": d.token_width},
        "conditioning": {"length": d.conditioning_length, "width": d.conditioning_width},
        "embedding": {"width": d.embedding_width},
        "schedule": {
            "kind": "scaled-linear",
            "steps": components.schedule.steps,
            "beta_start": components.schedule.beta_start,
            "beta_end": components.schedule.beta_end,
        },
        "prediction": "epsilon",
        "template": [list(point) for point in components.template],
        "thresholds": dict(components.thresholds),
        "licence": components.licence,
        "provenance": {**components.provenance, **provenance},
        "programs": {
            spec.name: {
                "file": f"{spec.name}.onnx",
                **digest(folder / f"{spec.name}.onnx"),
                **facts[spec.name].fields(),
                **tensor_entries(spec, d),
            }
            for spec in components.programs
        },
        "files": {
            file.name: digest(file)
            for file in sorted(folder.iterdir())
            if file.name not in onnx_files | {MANIFEST_FILE}
        },
    }
    write_json(folder, manifest)


def enter_program(
    folder: Path,
    spec: ProgramSpec,
    dimensions: Dimensions,
    facts: ProgramFacts,
    provenance: Mapping[str, str],
    files: Iterable[str] = (),
) -> None:
    """State a program that joins a finished bundle, in place of one of its name.

    Args:
        folder: Holds `<program>.onnx` and the manifest.
        spec: The program.
        dimensions: Sizes of the bundle's fixed axes.
        facts: What else to state.
        provenance: Added to what the manifest states.
        files: Other files that are new or have changed; those that do not exist are passed over.
    """
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    manifest["programs"][spec.name] = {
        "file": f"{spec.name}.onnx",
        **digest(folder / f"{spec.name}.onnx"),
        **facts.fields(),
        **tensor_entries(spec, dimensions),
    }
    for name in files:
        if (folder / name).exists():
            manifest["files"][name] = digest(folder / name)
    manifest["provenance"] = {**manifest["provenance"], **provenance}
    write_json(folder, manifest)


def tensor_entries(spec: ProgramSpec, dimensions: Dimensions) -> dict[str, Any]:
    """A program's declared inputs and outputs, as the manifest states them."""
    sides = (("inputs", spec.inputs), ("outputs", spec.outputs))
    return {
        side: [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape(dimensions))} for t in tensors
        ]
        for side, tensors in sides
    }


def write_json(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `bundle.json`; equal manifests give equal bytes."""
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def digest(file: Path) -> dict[str, Any]:
    """SHA-256 and size of a file, as the manifest states them."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else None
    if digest is None:  # Python 3.10
        digest = hashlib.sha256(file.read_bytes())
    return {"sha256": digest.hexdigest(), "bytes": file.stat().st_size}
