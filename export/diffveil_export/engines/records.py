"""Writing engines and their records: an engine and what it was built from change together."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from diffveil.engines.records import (
    FORMAT,
    RECORD_FILE,
    VERSION,
    EngineRecord,
    read_records,
)
from diffveil.errors import EngineError

__all__ = ["dump_records", "publish", "reason_to_build", "records_or_none"]

_COMPARED = ("program_sha256", "backend", "version", "target", "recipe", "profile", "flags", "file")


def records_or_none(folder: Path) -> dict[str, EngineRecord] | None:
    """The records of an engine folder; None where they are damaged and must be replaced."""
    try:
        return read_records(folder)
    except EngineError:
        return None


def reason_to_build(folder: Path, wanted: EngineRecord) -> str | None:
    """Why the engine in `folder` must be built, in words; None if it is there and as wanted.

    Args:
        folder: The engine folder.
        wanted: What the engine is to be; its sha256, bytes, seconds and dtypes are not looked at.
    """
    records = records_or_none(folder)
    if records is None:
        return "its record is damaged"
    record = records.get(wanted.program)
    if record is None:
        return "not built yet"
    changed = [n for n in _COMPARED if getattr(record, n) != getattr(wanted, n)]
    if changed:
        return f"changed: {', '.join(changed)}"
    try:
        data = (folder / record.file).read_bytes()
    except OSError:
        return "its file is missing"
    if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
        return "its file is damaged"
    return None


def dump_records(records: Mapping[str, EngineRecord]) -> bytes:
    """The bytes of a record file; the same records give the same bytes."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "engines": [asdict(records[program]) for program in sorted(records)],
    }
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def publish(folder: Path, record: EngineRecord, engine: bytes) -> None:
    """Put an engine and its record in place; if that fails, what was there before stays.

    Args:
        folder: The engine folder; it exists.
        record: The engine's record; replaces that of the same program.
        engine: The engine.

    Raises:
        OSError: A file cannot be written.
    """
    records = {**(records_or_none(folder) or {}), record.program: record}
    target = folder / record.file
    with _written(folder, engine) as new, _written(folder, dump_records(records)) as index:
        kept = _set_aside(target)
        try:
            os.replace(new, target)
            os.replace(index, folder / RECORD_FILE)
        except BaseException:
            if kept is not None:
                os.replace(kept, target)
            else:
                target.unlink(missing_ok=True)
            raise
        if kept is not None:
            kept.unlink(missing_ok=True)


def _set_aside(target: Path) -> Path | None:
    if not target.exists():
        return None
    kept = target.with_name(f".{target.name}.old")
    os.replace(target, kept)
    return kept


@contextmanager
def _written(folder: Path, data: bytes) -> Iterator[Path]:
    """A file with `data` on the disk, deleted unless the block has renamed it."""
    path = folder / f".engine-{secrets.token_hex(8)}"
    # Not mkstemp: engines follow the umask so that other users can run what root built, but are
    # never writable by them. O_EXCL refuses a name that somebody else was quicker to take.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags, 0o644), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield path
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
