"""Compiled kernels on disk: what each one is, how it is launched, and whether it is intact.

    FOLDER/kernels.json                  a record of each compiled kernel
    FOLDER/<name>.sm<target>.cubin       the kernel

A compiled kernel is code. The SHA-256 in its record finds damage and mix-ups, not an attacker, who
would write a matching record; so files that somebody else may have written are refused before that.
Compile kernels yourself, never take them from strangers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from diffveil_kernels.errors import KernelRecordError

__all__ = ["RECORD_FILE", "KernelRecord", "dump_records", "read_cubin", "read_records"]

RECORD_FILE = "kernels.json"
FORMAT = "diffveil-kernels"
VERSION = 1

_MAX_RECORD_BYTES = 1 << 20
_MAX_CUBIN_BYTES = 1 << 24
_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_OPEN |= getattr(os, "O_NOFOLLOW", 0)
_AGAIN = "compile the kernels again: diffveil build BUNDLE --kernels"
_TYPE = re.compile(r"\*(i8|u8|i32|i64|fp16|fp32|fp64)|i32|i64|fp32|fp64")


@dataclass(frozen=True)
class KernelRecord:
    """One compiled kernel.

    Attributes:
        name: Its name in `diffveil_kernels.specs.SPECS`.
        entry: Symbol of its entry point.
        target: Compute capability that it was compiled for, 89 for 8.9.
        arch: The same as PTX names it; with a final "a" it runs on that capability alone.
        parameters: Names and Triton types of what the caller passes, in order.
        hidden: Names of the pointers that this version of Triton adds after them, in order. They
            are scratch memory that none of these kernels needs, so they are null.
        constants: Compile-time constants.
        num_warps: Warps of a program.
        threads: Threads of a program, the block size of a launch.
        shared: Dynamic shared memory of a program, bytes.
        source_sha256: Hash of its source and of all functions that this calls, hex.
        triton: Version of the compiler.
        file: Name of its file, in the record's folder.
        sha256: Hash of that file, hex.
        bytes: Its size.
    """

    name: str
    entry: str
    target: int
    arch: str
    parameters: tuple[tuple[str, str], ...]
    hidden: tuple[str, ...]
    constants: Mapping[str, int | bool]
    num_warps: int
    threads: int
    shared: int
    source_sha256: str
    triton: str
    file: str
    sha256: str
    bytes: int


def dump_records(records: Iterable[KernelRecord]) -> bytes:
    """The bytes of a record file; the same records give the same bytes."""
    ordered = sorted(records, key=lambda record: (record.name, record.target))
    content = {"format": FORMAT, "version": VERSION, "kernels": [asdict(r) for r in ordered]}
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_records(folder: Path) -> tuple[KernelRecord, ...]:
    """The records of a folder of compiled kernels.

    Raises:
        KernelRecordError: There are none, they are damaged or of a newer version, or somebody else
            could have written them.
    """
    path = folder / RECORD_FILE
    data = _read(path, _MAX_RECORD_BYTES + 1)
    if len(data) > _MAX_RECORD_BYTES:
        raise KernelRecordError(f"{path} is larger than {_MAX_RECORD_BYTES} bytes; {_AGAIN}")
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise KernelRecordError(f"{path} is no record of compiled kernels; {_AGAIN}")
        if content["version"] != VERSION:
            raise KernelRecordError(
                f"{path} has version {content['version']}, this diffveil reads {VERSION}; {_AGAIN}"
            )
        return tuple(_record(entry) for entry in content["kernels"])
    # A damaged file may break anywhere: RecursionError is JSON nested too deep.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise KernelRecordError(f"{path} is damaged; {_AGAIN}") from error


def read_cubin(folder: Path, record: KernelRecord) -> bytes:
    """The compiled kernel of a record, checked.

    Raises:
        KernelRecordError: It is missing, is not what the record says, or somebody else could have
            written it.
    """
    path = folder / record.file
    data = _read(path, record.bytes + 1)
    if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
        raise KernelRecordError(f"{path} differs from its record; {_AGAIN}")
    return data


def _read(path: Path, limit: int) -> bytes:
    """The beginning of a plain file that nobody else could have written."""
    try:
        _check_owner(path.parent, os.stat(path.parent))
        with os.fdopen(os.open(path, _OPEN), "rb") as stream:
            state = os.fstat(stream.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise KernelRecordError(f"{path} is not a plain file; {_AGAIN}")
            _check_owner(path, state)
            return stream.read(limit)
    except OSError as error:
        raise KernelRecordError(
            f"no compiled kernels: {path}: {error.strerror}; {_AGAIN}"
        ) from error


def _check_owner(path: Path, state: os.stat_result) -> None:
    if os.name != "posix":
        return
    if state.st_uid not in (0, os.geteuid()) or state.st_mode & stat.S_IWOTH:
        raise KernelRecordError(
            f"{path} belongs to another user or can be written by everybody: kernels are code, so "
            f"they are not loaded; make them yours, or {_AGAIN}"
        )


def _record(entry: Mapping[str, Any]) -> KernelRecord:
    """A record from JSON; raises ValueError, TypeError or KeyError where it is not sound."""
    values = {field.name: entry[field.name] for field in fields(KernelRecord)}
    if not all(isinstance(values[name], list) for name in ("parameters", "hidden")):
        raise ValueError("parameters")
    values["parameters"] = tuple((name, kind) for name, kind in values["parameters"])
    values["hidden"] = tuple(values["hidden"])
    words = [values[name] for name in ("name", "entry", "arch", "triton", "file")]
    words += [text for pair in values["parameters"] for text in pair] + list(values["hidden"])
    numbers = [values[n] for n in ("target", "num_warps", "threads", "shared", "bytes")]
    hashes = [values["source_sha256"], values["sha256"]]
    sound = (
        all(isinstance(word, str) and word for word in words)
        and all(type(number) is int and number >= 0 for number in numbers)
        and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)
        and all(_TYPE.fullmatch(kind) for _, kind in values["parameters"])
        and isinstance(values["constants"], dict)
        and 1 <= values["threads"] <= 1024
        and values["bytes"] <= _MAX_CUBIN_BYTES
        and re.fullmatch(r"\w[\w.-]*", values["file"])  # within the folder
    )
    if not sound:
        raise ValueError(f"record of {values['name']!r}")
    return KernelRecord(**values)
