"""Which files a command reads, and where it may write.

Everything is planned before anything is computed, so that a command line that would overwrite
a photo, or write two results to one place, ends at once and leaves the disk as it was.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffveil.cli.exits import UsageError

__all__ = [
    "FACE",
    "KEY_SUFFIX",
    "Found",
    "Job",
    "check_targets",
    "find_keys",
    "find_photos",
    "output_folder",
    "plan_jobs",
    "plan_keys",
]

READABLE = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
KEY_SUFFIX = ".veilkey"
FACE = "face"
"""Marks the key file of one face: `group.face-0.veilkey`."""


@dataclass(frozen=True)
class Found:
    """One photo, and its place below the folder that was named (for a file: its name)."""

    path: Path
    relative: Path
    from_folder: bool


@dataclass(frozen=True)
class Job:
    """One photo's input and its outputs, one a variant."""

    source: Path
    outputs: tuple[Path, ...]
    key_name: Path  # below a folder of keys: the output's name without variant number + suffix


def find_photos(arguments: Iterable[str], exclude: Path | None = None) -> list[Found]:
    """Files, globs (where the shell expanded none) and folders, searched to the bottom.

    Args:
        arguments: what stands on the command line.
        exclude: a folder of results; where it lies inside a folder that is searched, the photos
            below it are not inputs.

    Raises:
        UsageError: an argument leads to no photo.
    """
    found: dict[Path, Found] = {}
    for argument in arguments:
        hits = [argument]
        if not os.path.exists(argument) and glob.has_magic(argument):
            hits = sorted(glob.glob(argument, recursive=True))
        photos = [photo for hit in hits for photo in _below(Path(hit), exclude)]
        if not photos:
            raise UsageError(f"{argument}: no photo there")
        for photo in photos:
            found.setdefault(photo.path.resolve(), photo)
    return list(found.values())


def _below(path: Path, exclude: Path | None) -> list[Found]:
    if path.is_dir():
        results = None if exclude is None else exclude.resolve()
        if results is not None and path.resolve() not in results.parents:
            results = None  # results beside or above the photos hide none of them
        return [
            Found(file, file.relative_to(path), True)
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in READABLE
            and file.is_file()
            and (results is None or results not in file.resolve().parents)
        ]
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    return [Found(path, Path(path.name), False)]


def plan_jobs(
    photos: Sequence[Found], output: str | None, *, tag: str, variants: int = 1
) -> list[Job]:
    """Where each photo's results go.

    Without `output`: beside the photo, as `name-<tag>.jpg`. With a folder (one that exists, a name
    without a suffix, or any name for several photos): into it, under the photo's own name (and
    below the same sub-folders, for a folder of photos). With a file: there. Several variants are
    numbered `-1`, `-2`, ….

    Raises:
        UsageError: a result would overwrite an input or another result, one file is named for
            several photos, or its suffix names no format.
    """
    folder = output is not None and _is_folder(output, photos)
    jobs = []
    for photo in photos:
        name = photo.path.name if _writable(photo.path) else photo.path.stem + ".png"
        if output is None:
            if photo.from_folder:
                raise UsageError("photos of a folder need -o FOLDER for their results")
            base = photo.path.with_name(f"{Path(name).stem}-{tag}{Path(name).suffix}")
        elif folder:
            base = Path(output) / photo.relative.with_name(name)
        else:
            base = Path(output)
            if not _writable(base):
                known = " ".join(sorted(READABLE))
                raise UsageError(f"-o {output}: the suffix must be one of {known}")
        outputs: tuple[Path, ...] = (base,)
        if variants > 1:
            outputs = tuple(
                base.with_name(f"{base.stem}-{number}{base.suffix}")
                for number in range(1, variants + 1)
            )
        key_name = photo.relative.with_name(base.name + KEY_SUFFIX)
        jobs.append(Job(photo.path, outputs, key_name))
    check_targets(
        [(job.source, output) for job in jobs for output in job.outputs],
        inputs=[job.source for job in jobs],
    )
    return jobs


def plan_keys(jobs: Sequence[Job], key: str) -> list[Path]:
    """Where the recovery key of each photo goes: one file for one photo, else into a folder.

    Raises:
        UsageError: a key would overwrite anything. A key that is gone cannot be made again, and
            with it the photos that it recovers are gone too.
    """
    if len(jobs) > 1 or os.path.isdir(key) or key.endswith(("/", os.sep)):
        if os.path.exists(key) and not os.path.isdir(key):
            raise UsageError(f"--key {key}: is a file, but several photos need a folder of keys")
        paths = [Path(key) / job.key_name for job in jobs]
    else:
        paths = [Path(key)]
    targets = [(job.source, output) for job in jobs for output in job.outputs]
    targets += [(job.source, path) for job, path in zip(jobs, paths, strict=True)]
    check_targets(targets, inputs=[job.source for job in jobs])
    for path in paths:
        if path.exists():
            raise UsageError(
                f"--key {path}: exists already, and what it recovers would be lost with it; "
                "move it away or name another file"
            )
    return paths


def find_keys(key: str, photo: Found) -> list[Path]:
    """The key files of a protected photo: the file itself, or those of its name in a folder.

    In a folder that is one file; or, where the faces of the photo have been split, one for each of
    them.

    Raises:
        UsageError: there is none.
    """
    path = Path(key)
    if not path.is_dir():
        if not path.is_file():
            raise UsageError(f"--key {key}: no such file")
        return [path]
    name, stem, suffix = photo.path.name, photo.path.stem, photo.path.suffix
    names = [name, stem]
    head, dash, number = stem.rpartition("-")
    if dash and number.isdecimal():  # one of several variants, which share a key
        names += [head + suffix, head]
    places = [(folder, name) for name in names for folder in (path / photo.relative.parent, path)]
    for folder, name in places:
        if (folder / (name + KEY_SUFFIX)).is_file():
            return [folder / (name + KEY_SUFFIX)]
    for folder, name in places:
        parts = sorted(folder.glob(f"{glob.escape(name)}.{FACE}-*{KEY_SUFFIX}"))
        if parts:
            return parts
    raise UsageError(f"--key {key}: holds no {names[0]}{KEY_SUFFIX} for {photo.path}")


def check_targets(targets: Sequence[tuple[Path, Path]], inputs: Sequence[Path]) -> None:
    """Refuses targets that are inputs, and two results in one place.

    Args:
        targets: pairs of a photo and a file to be written for it.
        inputs: files that must stay as they are.

    Raises:
        UsageError: a target collides.
    """
    kept = {os.path.realpath(path) for path in inputs}
    identities = {_identity(path) for path in inputs}
    taken: dict[str, Path] = {}
    for source, target in targets:
        real = os.path.realpath(target)
        if real in kept or (target.exists() and _identity(target) in identities):
            raise UsageError(f"{target}: would overwrite an input; name another place with -o")
        if target.is_dir():
            raise UsageError(f"{target}: is a folder, expected a file to write")
        if real in taken:
            raise UsageError(f"{target}: both {taken[real]} and {source} would be written there")
        taken[real] = source


def output_folder(output: str | None) -> Path | None:
    """`-o` where it names a folder that exists: what is in there are results, not inputs."""
    return Path(output) if output is not None and os.path.isdir(output) else None


def _identity(path: Path) -> tuple[int, int]:
    # Device and inode: finds an input behind a hard link or a case-insensitive name too.
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_folder(output: str, photos: Sequence[Found]) -> bool:
    if os.path.isdir(output) or output.endswith(("/", os.sep)):
        return True
    several = len(photos) > 1 or any(photo.from_folder for photo in photos)
    if several and os.path.exists(output):
        raise UsageError(f"-o {output}: is a file, but several photos need a folder")
    # No suffix, no photo: so a glob writes to the same place whether it meets one photo or many.
    return several or (not Path(output).suffix and not os.path.exists(output))


def _writable(path: Path) -> bool:
    return path.suffix.lower() in READABLE
