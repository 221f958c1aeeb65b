"""What runs how fast in ONNX Runtime on a CPU, as ratios within one run.

    python -m benchmarks.cpu [--bundle DIR] [--out DIR] [--seconds N]

Three questions: what each program costs; what ONNX Runtime's session options are worth; and
whether the sampling loop gains by `step`, by buffers that stay bound, or by one graph of all steps.

What is compared takes turns, in an order that rotates, so that whatever else the machine does falls
on all alike; a ratio is the median of the ratios within each turn, beside its quartiles. One way
runs twice, and only what is further from it than that is called faster or slower. Timed are calls
on prepared inputs; loading, photos and files are not. Needs the export extra: `step` is fused into
a temporary copy of the bundle. Writes `cpu.json` and `cpu.md` to `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from benchmarks._cpu_loops import LoopCase, plan_of, unrolled
from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.programs import ALL_PROGRAMS
from diffveil_export.step import StepGraphs, fuse_step, guide_of
from diffveil_export.verify import random_inputs

_BATCHES = (1, 8)
_STEPS = (2, 4)
_FEWEST = 5

Record = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """One of several ways that took turns.

    Attributes:
        name: The way.
        ms: Median milliseconds.
        cpu_ms: Median milliseconds of all CPUs together.
        ratio: Median of its time over the first way's in the same turn.
        quartiles: Lower and upper quartile of that ratio.
        cpu_ratio: Like `ratio`, of the CPUs' time, which other processes disturb less.
        cpu_quartiles: Its quartiles.
        turns: Number of turns.
        verdict: "faster" or "slower" where all quartiles of both ratios lie on one side of 1 and
            of those of the first way against itself; else "as fast".
    """

    name: str
    ms: float
    cpu_ms: float
    ratio: float
    quartiles: tuple[float, float]
    cpu_ratio: float
    cpu_quartiles: tuple[float, float]
    turns: int
    verdict: str = "as fast"


def take_turns(ways: Mapping[str, Callable[[], object]], seconds: float) -> list[Timing]:
    """Time functions against the first of them.

    Args:
        ways: Functions by name. The second does the same as the first: how far apart these two are
            is what says nothing.
        seconds: Time to spend; at least five turns are taken.
    """
    names = list(ways)
    for name in names:
        ways[name]()
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    until = time.perf_counter() + seconds
    while len(spent[names[0]]) < _FEWEST or time.perf_counter() < until:
        first = len(spent[names[0]]) % len(names)
        for name in names[first:] + names[:first]:
            started, cpu = time.perf_counter(), time.process_time()
            ways[name]()
            took = time.perf_counter() - started, time.process_time() - cpu
            spent[name].append((1000 * took[0], 1000 * took[1]))
    base = np.array(spent[names[0]])
    timings: list[Timing] = []
    for name in names:
        times = np.array(spent[name])
        low, middle, high = np.quantile(times / base, (0.25, 0.5, 0.75), axis=0).tolist()
        ms, cpu_ms = np.median(times, axis=0).tolist()
        timing = Timing(
            name,
            ms,
            cpu_ms,
            ratio=middle[0],
            quartiles=(low[0], high[0]),
            cpu_ratio=middle[1],
            cpu_quartiles=(low[1], high[1]),
            turns=len(base),
        )
        if len(timings) > 1:
            timing = replace(timing, verdict=_verdict(timing, timings[1]))
        timings.append(timing)
    return timings


def _verdict(timing: Timing, same: Timing) -> str:
    pairs = (
        (timing.quartiles, same.quartiles),
        (timing.cpu_quartiles, same.cpu_quartiles),
    )
    if all(high < min(1.0, low) for (_, high), (low, _) in pairs):
        return "faster"
    if all(low > max(1.0, high) for (low, _), (_, high) in pairs):
        return "slower"
    return "as fast"


class Tuned(ONNXRuntimeCPU):
    """The backend with some session options changed."""

    def __init__(self, change: Callable[[Any], None], threads: int | None = None) -> None:
        super().__init__(threads)
        self._change = change

    def options(self) -> Any:
        """The backend's, changed."""
        options = super().options()
        self._change(options)
        return options


def _set(name: str, value: object) -> Callable[[Any], None]:
    return lambda options: setattr(options, name, value)


def _entry(name: str, value: str) -> Callable[[Any], None]:
    return lambda options: options.add_session_config_entry(name, value)


def option_ways(threads: int) -> dict[str, ONNXRuntimeCPU]:
    """Backends by what differs from the runtime's own options, which come first and second."""
    level = ort.GraphOptimizationLevel
    changes = {
        "optimisation: none": _set("graph_optimization_level", level.ORT_DISABLE_ALL),
        "optimisation: basic": _set("graph_optimization_level", level.ORT_ENABLE_BASIC),
        "optimisation: extended": _set("graph_optimization_level", level.ORT_ENABLE_EXTENDED),
        "memory arena": _set("enable_cpu_mem_arena", True),
        "no memory pattern": _set("enable_mem_pattern", False),
        "threads spin": _entry("session.intra_op.allow_spinning", "1"),
        "int8 weights unpacked at every call": _entry("session.disable_quant_qdq", "0"),
    }
    ways: dict[str, ONNXRuntimeCPU] = {
        "as the runtime does": ONNXRuntimeCPU(threads),
        "the same again": ONNXRuntimeCPU(threads),
    }
    if threads > 1:
        ways["one thread"] = ONNXRuntimeCPU(1)
    ways |= {name: Tuned(change, threads) for name, change in changes.items()}
    return ways


def _feed(bundle: Bundle, program: str, batch: int) -> dict[str, Any]:
    spec = ALL_PROGRAMS[program]
    generator = torch.Generator().manual_seed(batch)
    inputs = random_inputs(spec, bundle.dimensions, batch, generator)
    return {t.name: x.numpy() for t, x in zip(spec.inputs, inputs, strict=True)}


def measure_programs(programs: Programs) -> list[Record]:
    """Milliseconds of each program with one face and with eight."""
    rows = []
    for name in programs.bundle.manifest.programs:
        record: Record = {"program": name}
        for batch in _BATCHES:
            call = partial(programs.engine(name).run, **_feed(programs.bundle, name, batch))
            timing = take_turns({"call": call}, 0.0)[0]
            record |= {f"ms_{batch}": timing.ms, f"cpu_ms_{batch}": timing.cpu_ms}
        rows.append(record)
    return rows


def measure_options(bundle: Bundle, threads: int, seconds: float) -> list[Record]:
    """Session options on the programs that take most of the time, one face."""
    rows = []
    for name in ("denoise", "decode", guide_of(bundle)):
        feed = _feed(bundle, name, 1)
        engines = {way: backend.load(bundle, name) for way, backend in option_ways(threads).items()}
        ways = {way: partial(engine.run, **feed) for way, engine in engines.items()}
        rows += [{"program": name, **asdict(t)} for t in take_turns(ways, seconds)]
        for engine in engines.values():
            engine.close()
    return rows


def measure_loops(programs: Programs, threads: int, seconds: float) -> list[Record]:
    """The sampling loop of the fast plan with one gradient a step, in each of its forms."""
    rows = []
    graphs = StepGraphs(programs.bundle)
    for steps in _STEPS:
        path = unrolled(programs.bundle, graphs, steps)
        options = ONNXRuntimeCPU(threads).options()
        session = ort.InferenceSession(os.fspath(path), sess_options=options)
        for faces in _BATCHES:
            ways = LoopCase(programs, plan_of(steps), faces, session).ways()
            results = {name: way() for name, way in ways.items()}
            expected = next(iter(results.values()))
            for timing in take_turns(ways, seconds):
                error = float(np.abs(results[timing.name] - expected).max())
                facts = {"steps": steps, "faces": faces, "max_difference": error}
                rows.append({**facts, **asdict(timing)})
    return rows


def as_markdown(report: Record) -> str:
    """The report as tables."""
    lines = [
        f"{report['bundle']} on {report['machine']}, {report['threads']} threads, "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        + f". Command: `{report['command']}`.",
        "",
        "| program | one face | of the CPUs | eight faces | of the CPUs |",
        "|---|---|---|---|---|",
    ]
    for row in report["programs"]:
        numbers = [row[f"{kind}_{batch}"] for batch in _BATCHES for kind in ("ms", "cpu_ms")]
        cells = " | ".join(f"{number:.1f} ms" for number in numbers)
        lines.append(f"| `{row['program']}` | {cells} |")
    lines += [
        "",
        "| program | option | time | quartiles | CPU time | quartiles | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| `{row['program']}` | {_cells(row)} |" for row in report["options"]]
    lines += [
        "",
        "| steps | faces | loop | time | quartiles | CPU time | quartiles | | largest difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['steps']} | {row['faces']} | {_cells(row)} | {row['max_difference']:.1e} |"
        for row in report["loops"]
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Record) -> str:
    cells = [row["name"]]
    for kind in ("", "cpu_"):
        low, high = row[f"{kind}quartiles"]
        cells += [f"{row[f'{kind}ratio']:.3f}", f"{low:.3f} … {high:.3f}"]
    return " | ".join([*cells, row["verdict"]])


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--bundle", type=Path, help="default: the embedded one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for each comparison (default: %(default)g)"
    )
    args = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    ort.set_default_logger_severity(3)  # it warns of every option that is set twice
    threads = args.threads or ONNXRuntimeCPU().options().intra_op_num_threads
    with tempfile.TemporaryDirectory() as folder:
        bundle = fuse_step(Bundle.load(args.bundle), Path(folder) / "fused")
        with Programs(bundle, ONNXRuntimeCPU(threads)) as programs:
            report: Record = {
                "bundle": bundle.name,
                "fingerprint": bundle.fingerprint,
                "machine": platform.machine(),
                "threads": threads,
                "versions": {
                    "Python": platform.python_version(),
                    "onnxruntime": version("onnxruntime"),
                    "numpy": version("numpy"),
                },
                "command": " ".join(["python -m benchmarks.cpu", *given]),
                "programs": measure_programs(programs),
                "options": measure_options(bundle, threads, args.seconds),
                "loops": measure_loops(programs, threads, args.seconds),
            }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "cpu.md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
