"""What a benchmark measured: one schema for every case, kept as JSON lines.

A line is a `Result`. Files are appended to, never rewritten, so that runs of different machines and
versions stand beside each other; a run is told by `run`. Reading checks every line, because files
are edited and merged by hand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _machine

__all__ = ["UNITS", "Recorder", "Result", "ResultError", "append", "latest", "quantiles", "read"]

UNITS = ("s", "ms", "µs", "MiB", "KiB/call", "×", "exponent", "faces/s", "TFLOP/s", "share")
"""Units that results may have; `×` is a ratio within one run, `share` a part of one."""

_LONGEST_LINE = 16_384


class ResultError(ValueError):
    """A result is not what the schema allows; the message names the field, and file and line."""


@dataclass(frozen=True)
class Result:
    """One figure.

    Attributes:
        case: What was measured, as `group/name`.
        provider: What did it: `diffveil cpu`, `PyTorch eager`, `deface`, …
        metric: What the figure is: `time`, `memory`, `time over fast`, …
        unit: One of `UNITS`.
        p20: A fifth of the measurements are smaller.
        p50: Their median.
        p80: A fifth are larger. All three are None where the case could not be run.
        count: Number of measurements.
        config: What the case was run with, and under `excluded` what is not in the figure.
        hardware: Processor, CPUs that may be used, memory.
        versions: Of Python and the packages.
        commit: Of the sources, `-dirty` if they were changed since; empty outside a checkout.
        run: When the run began, ISO 8601 in UTC: the same for all results of one run.
        time: When this was measured.
        not_run: Why the case could not be run; empty where it was.

    Raises:
        ResultError: Attributes are of the wrong type or out of range; the message names all.
    """

    case: str
    provider: str
    metric: str
    unit: str
    p20: float | None
    p50: float | None
    p80: float | None
    count: int
    config: Mapping[str, Any] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    run: str = ""
    time: str = ""
    not_run: str = ""

    def __post_init__(self) -> None:
        problems = [*self._wrong_texts(), *self._wrong_numbers()]
        problems += [
            f"{name} is not an object"
            for name in ("config", "hardware", "versions")
            if not isinstance(getattr(self, name), Mapping)
        ]
        if problems:
            raise ResultError("result: " + "; ".join(problems))

    def _wrong_texts(self) -> list[str]:
        texts = ("case", "provider", "metric", "unit", "commit", "run", "time", "not_run")
        wrong = [f"{n} is not a text" for n in texts if not isinstance(getattr(self, n), str)]
        if wrong:
            return wrong
        wrong = [f"{n} is empty" for n in ("case", "provider", "metric") if not getattr(self, n)]
        if self.unit not in UNITS:
            wrong.append(f"unit is {self.unit!r}, expected one of {', '.join(UNITS)}")
        for name in ("run", "time"):
            value = getattr(self, name)
            try:
                if value and datetime.fromisoformat(value).tzinfo is None:
                    wrong.append(f"{name} is {value!r}, expected a time zone with it")
            except ValueError:
                wrong.append(f"{name} is {value!r}, expected a time in ISO 8601")
        return wrong

    def _wrong_numbers(self) -> list[str]:
        values = (self.p20, self.p50, self.p80)
        count: Any = self.count  # as a file has it
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            return [f"count is {count!r}, expected an integer, at least 0"]
        if self.not_run:
            return ["figures of a case that was not run"] if values != (None,) * 3 else []
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) < 3 or not all(map(math.isfinite, numbers)):
            return [f"p20, p50, p80 are {values}, expected three finite numbers"]
        if sorted(numbers) != numbers:
            return [f"p20, p50, p80 are {values}, expected them in ascending order"]
        return [] if self.count else ["count is 0, expected at least one measurement"]


def quantiles(values: Iterable[float]) -> dict[str, Any]:
    """`p20`, `p50`, `p80` and `count` of measurements, as fields of a `Result`."""
    numbers = np.asarray(list(values), np.float64)
    p20, p50, p80 = np.quantile(numbers, (0.2, 0.5, 0.8)).tolist()
    return {"p20": p20, "p50": p50, "p80": p80, "count": len(numbers)}


class Recorder:
    """Makes results of one run, and appends each to a file as soon as it is there.

    Args:
        path: The file of JSON lines; None keeps results in memory alone.
        config: Configuration of the whole run, part of every result's, beside the load that the
            machine had when it began.
        hardware: What the machine has besides.
        packages: Packages whose versions are noted besides.
    """

    def __init__(
        self,
        path: Path | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        hardware: Mapping[str, Any] | None = None,
        packages: Iterable[str] = (),
    ) -> None:
        self.path, self.results = path, list[Result]()
        self._common: dict[str, Any] = {
            "hardware": {**_machine.hardware(), **(hardware or {})},
            "versions": _machine.versions(packages),
            "commit": _machine.commit(),
            "run": _now(),
        }
        self._config = {"load": _machine.load(), **(config or {})}

    def add(
        self,
        case: str,
        provider: str,
        metric: str,
        unit: str,
        values: Iterable[float],
        **config: Any,
    ) -> Result:
        """Keep measurements; keywords are the case's configuration."""
        return self._keep(case, provider, metric, unit, config, **quantiles(values))

    def not_run(self, case: str, provider: str, why: str, **config: Any) -> Result:
        """Keep that a case could not be run, and why."""
        nothing = {"p20": None, "p50": None, "p80": None, "count": 0}
        return self._keep(case, provider, "time", "s", config, not_run=why, **nothing)

    def _keep(
        self,
        case: str,
        provider: str,
        metric: str,
        unit: str,
        config: Mapping[str, Any],
        **figures: Any,
    ) -> Result:
        result = Result(
            case,
            provider,
            metric,
            unit,
            config={**self._config, **config},
            time=_now(),
            **figures,
            **self._common,
        )
        self.results.append(result)
        if self.path is not None:
            append(self.path, [result])
        return result


def append(path: Path, results: Iterable[Result]) -> None:
    """Add results to a file of JSON lines, each whole: a line is written at once.

    Raises:
        ResultError: A line would be longer than a reader takes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            # What an interrupted writer left must not swallow the next line.
            torn = stream.read(1) != b"\n"
            stream.write(b"\n" * torn)
        for result in results:
            line = json.dumps(asdict(result), sort_keys=True, ensure_ascii=False).encode() + b"\n"
            if len(line) > _LONGEST_LINE:
                raise ResultError(f"result of {result.case}: {len(line)} bytes are too long a line")
            stream.write(line)
        stream.flush()


def read(path: Path) -> list[Result]:
    """Results of a file of JSON lines, in its order.

    Raises:
        ResultError: A line is no result; the message names file, line and what is wrong.
    """
    results = []
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE + 1), b""), 1):
            try:
                results.append(_parse(line))
            except ResultError as error:
                raise ResultError(
                    f"{path.name}, line {number}: {error}; mend or delete it"
                ) from None
    return results


def latest(results: Iterable[Result]) -> list[Result]:
    """Of every case the results of the run that measured it last, in the order of the file."""
    results = list(results)
    last: dict[str, str] = {}
    for result in results:
        last[result.case] = max(result.run, last.get(result.case, ""))
    return [r for r in results if r.run == last[r.case]]


def _parse(line: bytes) -> Result:
    if len(line) > _LONGEST_LINE:
        raise ResultError(f"longer than {_LONGEST_LINE} bytes")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ResultError(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ResultError("not a JSON object")
    known = {f.name for f in fields(Result)}
    if set(found) != known:
        missing, unknown = sorted(known - set(found)), sorted(set(found) - known)
        raise ResultError(f"fields missing: {missing}, unknown: {unknown}")
    return Result(**found)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
