"""What a command says about one photo: a JSON object on a line, or a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffveil.cli.exits import ExitCode, exit_code_of
from diffveil.cli.progress import ProgressBar

if TYPE_CHECKING:
    from diffveil.faces import Face

__all__ = ["describe_photo", "failed_photo", "json_line", "report_failure"]


def describe_photo(
    source: Path,
    outputs: Sequence[Path],
    key: Path | None,
    backend: str | None,
    seconds: float,
    faces: Sequence[Face],
) -> dict[str, Any]:
    """The fields that scripts rely on; `outputs` is there only for several variants."""
    record: dict[str, Any] = {
        "input": str(source),
        "output": str(outputs[0]),
        "key": None if key is None else str(key),
        "backend": backend,
        "seconds": round(seconds, 3),
        "faces": [face.to_json() for face in faces],
    }
    if len(outputs) > 1:
        record["outputs"] = [str(output) for output in outputs]
    return record


def failed_photo(source: Path, error: BaseException) -> dict[str, Any]:
    """The same fields for a photo that got no result, and why."""
    return {
        "input": str(source),
        "output": None,
        "key": None,
        "backend": None,
        "seconds": 0.0,
        "faces": [],
        "error": {"kind": type(error).__name__, "message": str(error)},
    }


def report_failure(
    bar: ProgressBar,
    source: Path,
    error: Exception,
    *,
    as_json: bool,
    culprit: Path | None = None,
) -> int:
    """Says why a photo got no result, to people and, where asked, to scripts.

    Args:
        bar: what is drawn on the terminal now.
        source: the photo.
        error: what happened to it.
        as_json: whether results are JSON lines.
        culprit: the file to blame, where that is not the photo.

    Returns:
        The exit code that the error stands for.
    """
    if as_json:
        bar.message(json_line(failed_photo(source, error)), sys.stdout)
    culprit = source if culprit is None else culprit
    reason = str(error).removeprefix(f"{culprit.name}: ").removeprefix(f"{culprit}: ")
    bar.message(f"diffveil: {culprit}: {reason}", sys.stderr)
    code = exit_code_of(error)
    return ExitCode.FAILED if code is None else code


def json_line(record: dict[str, Any]) -> str:
    """One object on one line, ASCII-safe for any terminal and pipe."""
    return json.dumps(record, allow_nan=False)
