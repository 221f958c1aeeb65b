"""Engine files of a bundle: what they were built from, and whether they may be loaded.

Engines lie beside the manifest, one folder for each backend, builder version and GPU:

    BUNDLE/engines/<backend>-<version>-<target>/engine.json      a record of each engine
    BUNDLE/engines/<backend>-<version>-<target>/<program>.engine

An engine is code. The SHA-256 in its record finds damage and mix-ups, not an attacker, who would
write a matching record; so files that somebody else may have written are refused before that.
`diffveil_export.engines` writes what this module reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from diffveil.bundle import Bundle
from diffveil.engines._recordfields import RecordReader
from diffveil.errors import EngineError

__all__ = [
    "ENGINES_FOLDER",
    "RECORD_FILE",
    "EngineFile",
    "EngineRecord",
    "ShapeRange",
    "engine_folder",
    "find_engine",
    "open_own",
    "parse_records",
    "program_digest",
    "read_records",
]

ENGINES_FOLDER = "engines"
RECORD_FILE = "engine.json"
FORMAT = "diffveil-engines"
VERSION = 1

_MAX_RECORD_BYTES = 1 << 20
_CHUNK = 1 << 20
_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_OPEN |= getattr(os, "O_NOFOLLOW", 0)
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one input that an engine takes, and the one it is tuned for."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class EngineRecord:
    """How one engine was made.

    Attributes:
        program: The program.
        program_sha256: Content of the program: `program_digest` of the bundle it was built from.
        backend: `tensorrt-rtx` or `tensorrt`.
        version: The builder's version.
        target: Compute capability that it runs on, `sm89` for 8.9.
        recipe: Revision of the way from program to engine.
        profile: Shapes of each input.
        inputs: Dtype of each input of the engine.
        outputs: Dtype of each output of the engine.
        flags: Options of the build that change the engine.
        file: Name of the engine's file, in the record's folder.
        sha256: Hash of that file, hex.
        bytes: Its size.
        seconds: How long the build took.
    """

    program: str
    program_sha256: str
    backend: str
    version: str
    target: str
    recipe: int
    profile: Mapping[str, ShapeRange]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    flags: Mapping[str, bool | int | str | None]
    file: str
    sha256: str
    bytes: int
    seconds: float

    @property
    def max_batch(self) -> int:
        """Most rows of one call."""
        return next(iter(self.profile.values())).max[0]


@dataclass(frozen=True)
class EngineFile:
    """An engine that was found fit to be loaded: its path and its record."""

    path: Path
    record: EngineRecord

    def read(self) -> bytes:
        """The engine's bytes, checked once more while they are read.

        Raises:
            EngineError: It was changed since it was found, or cannot be read.
        """
        with open_own(self.path) as stream:
            data = stream.read(self.record.bytes + 1)
        _compare(self, len(data), hashlib.sha256(data).hexdigest())
        return data


def engine_folder(bundle: Bundle, backend: str, version: str, target: str) -> Path:
    """Where the engines of one backend, builder version and GPU lie.

    Raises:
        EngineError: A part is not fit to be part of a folder's name.
    """
    for part in (backend, version, target):
        if not _PART.fullmatch(part):
            raise EngineError(f"'{part[:64]}' cannot be part of the name of an engine folder")
    return bundle.path / ENGINES_FOLDER / f"{backend}-{version}-{target}"


def program_digest(bundle: Bundle, program: str) -> str:
    """SHA-256, hex, of a program's content: its ONNX file and all weight files that it refers to.

    It is computed from the manifest's hashes, which `Bundle.program_path` holds the files against.

    Raises:
        BundleError: There is no such program.
    """
    entry = bundle.program(program)
    covered = {
        "onnx": entry.file.sha256,
        "data": {name: bundle.manifest.files[name].sha256 for name in entry.data},
    }
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(b"diffveil/v1/program\0" + canonical).hexdigest()


def find_engine(
    bundle: Bundle,
    program: str,
    backend: str,
    version: str,
    target: str,
    *,
    check_contents: bool = True,
) -> EngineFile:
    """Find the engine of a program and establish that it may be loaded.

    Args:
        bundle: The bundle.
        program: The program.
        backend: Which kind of engine.
        version: Version of the library that is to run it; engines of another are not looked at.
        target: The GPU's compute capability, as `present_target` names it.
        check_contents: Hash the file now. `EngineFile.read` hashes what it reads in any case.

    Returns:
        The engine's path and record.

    Raises:
        BundleError: There is no such program.
        EngineError: There is no such engine; or it is not this program's, is damaged, or could
            have been written by somebody else. The message names every field that differs.
    """
    digest = program_digest(bundle, program)
    folder = engine_folder(bundle, backend, version, target)
    for place in (folder.parent, folder):
        _check_folder(place, bundle, backend)
    record = read_records(folder).get(program)
    again = _rebuild(bundle, backend, program)
    if record is None:
        raise EngineError(f"'{folder}' holds no engine of program '{program}'; {again}")
    expected = {
        "program": program,
        "program_sha256": digest,
        "backend": backend,
        "version": version,
        "target": target,
        "file": f"{program}.engine",
    }
    differing = [
        f"{name}: received {_short(getattr(record, name))}, expected {_short(value)}"
        for name, value in expected.items()
        if getattr(record, name) != value
    ]
    if differing:
        raise EngineError(
            f"the engine of program '{program}' in '{folder}' was built for something else: "
            + "; ".join(differing)
            + f"; {again}"
        )
    engine = EngineFile(folder / record.file, record)
    with open_own(engine.path) as stream:
        size, checksum = os.fstat(stream.fileno()).st_size, record.sha256
        if check_contents and size == record.bytes:
            checksum = _hash(stream)
    _compare(engine, size, checksum)
    return engine


def read_records(folder: Path) -> dict[str, EngineRecord]:
    """The records of an engine folder by program; none where there is no record file.

    Raises:
        EngineError: The record file is damaged, or could have been written by somebody else.
    """
    file = folder / RECORD_FILE
    if not os.path.lexists(file):
        return {}
    with open_own(file) as stream:
        raw = stream.read(_MAX_RECORD_BYTES + 1)
    if len(raw) > _MAX_RECORD_BYTES:
        raise EngineError(f"'{file}' is larger than {_MAX_RECORD_BYTES} bytes: no engine record")
    try:
        return parse_records(json.loads(raw))
    except (ValueError, RecursionError) as error:
        raise EngineError(f"'{file}' is not valid JSON: {error}") from error
    except EngineError as error:
        raise EngineError(f"'{file}': {error}; delete the folder and build again") from error


def parse_records(content: Any) -> dict[str, EngineRecord]:
    """Check the decoded JSON of a record file and turn it into records by program.

    Raises:
        EngineError: Fields are missing, unknown or wrong; all of them are named.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise EngineError(f"not an engine record: field 'format' is not '{FORMAT}'")
    if content.get("version") != VERSION:
        raise EngineError(f"record version {str(content.get('version'))[:20]} is not {VERSION}")
    r = RecordReader()
    r.object(content, "record", ("format", "version", "engines"))
    records = [_record(r, row, f"engines[{i}]") for i, row in enumerate(r.rows(content))]
    found = {record.program: record for record in records}
    if len(found) != len(records):
        r.problems.append("engines: a program appears twice")
    if r.problems:
        raise EngineError("malformed engine record: " + "; ".join(r.problems[:20]))
    return found


def _record(r: RecordReader, value: Any, path: str) -> EngineRecord:
    f = r.object(value, path, tuple(EngineRecord.__dataclass_fields__))
    profile = {
        name: ShapeRange(*r.shapes(shapes, f"{path}.profile.{name}"))
        for name, shapes in r.mapping(f.get("profile"), f"{path}.profile").items()
    }
    if not profile:
        r.problems.append(f"{path}.profile: expected at least one input")
    return EngineRecord(
        program=r.text(f.get("program"), f"{path}.program"),
        program_sha256=r.sha256(f.get("program_sha256"), f"{path}.program_sha256"),
        backend=r.text(f.get("backend"), f"{path}.backend"),
        version=r.text(f.get("version"), f"{path}.version"),
        target=r.text(f.get("target"), f"{path}.target"),
        recipe=r.integer(f.get("recipe"), f"{path}.recipe"),
        profile=profile,
        inputs=r.dtypes(f.get("inputs"), f"{path}.inputs"),
        outputs=r.dtypes(f.get("outputs"), f"{path}.outputs"),
        flags=r.flags(f.get("flags"), f"{path}.flags"),
        file=r.text(f.get("file"), f"{path}.file"),
        sha256=r.sha256(f.get("sha256"), f"{path}.sha256"),
        bytes=r.integer(f.get("bytes"), f"{path}.bytes"),
        seconds=r.number(f.get("seconds"), f"{path}.seconds"),
    )


def _rebuild(bundle: Bundle, backend: str, program: str = "") -> str:
    only = f" --programs {program}" if program else ""
    return f"run `diffveil build {bundle.path} --backend {backend}{only}`"


def _check_folder(folder: Path, bundle: Bundle, backend: str) -> None:
    try:
        state = os.lstat(folder)
    except FileNotFoundError:
        raise EngineError(f"no engines at '{folder}'; {_rebuild(bundle, backend)}") from None
    except OSError as error:
        raise EngineError(f"'{folder}' cannot be read ({error.strerror})") from error
    if not stat.S_ISDIR(state.st_mode):
        raise EngineError(f"'{folder}' is not a folder; delete it and {_rebuild(bundle, backend)}")
    _check_owner(folder, state)


def open_own(path: Path) -> BinaryIO:
    """Open a plain file that nobody else could have written; what is checked is what is read.

    Raises:
        EngineError: It is none, or cannot be read.
    """
    try:
        stream = os.fdopen(os.open(path, _OPEN), "rb")
    except OSError as error:
        raise EngineError(
            f"engine file '{path}' cannot be read ({error.strerror}); build it again, "
            "and copy engines as plain files"
        ) from error
    try:
        state = os.fstat(stream.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise EngineError(f"engine file '{path}' is not a plain file; build it again")
        _check_owner(path, state)
    except BaseException:
        stream.close()
        raise
    return stream


def _check_owner(path: Path, state: os.stat_result) -> None:
    if os.name != "posix":
        return
    user = os.geteuid()
    if state.st_uid not in (0, user):
        raise EngineError(
            f"'{path}' belongs to user {state.st_uid}, not to user {user} who runs this: engines "
            "are code, so only your own or root's are loaded; build them yourself, or make them "
            f"yours with `chown` if you trust who built them"
        )
    if state.st_mode & stat.S_IWOTH:
        raise EngineError(
            f"'{path}' can be written by everybody (mode {stat.S_IMODE(state.st_mode):o}): engines "
            f"are code; run `chmod o-w '{path}'` and build them again"
        )


def _hash(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _compare(engine: EngineFile, size: int, checksum: str) -> None:
    record, problems = engine.record, []
    if size != record.bytes:
        problems.append(f"bytes: received {size}, expected {record.bytes}")
    elif checksum != record.sha256:
        problems.append(f"sha256: received {_short(checksum)}, expected {_short(record.sha256)}")
    if problems:
        raise EngineError(
            f"engine file '{engine.path}' differs from its record: {'; '.join(problems)}; "
            f"build it again with `diffveil build --backend {record.backend} --force`"
        )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:16]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else f"'{text[:64]}'"
