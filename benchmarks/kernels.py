"""What the device kernels are worth on a GPU: correctness first, then time.

    python -m benchmarks.kernels [--out DIR] [--batch N] [--size S] [--photo P]

Every kernel is held against NumPy twice: as `diffveil build --kernels` compiles it, launched
through cuda-core, and as Triton compiles and launches it. One that fails is not timed, and the exit
status is 1. Timed is the first of the two, which is what a runtime would launch. What fails in
any way is recorded and the others go on, unless the device itself is lost. Times are medians
of a CUDA graph of 20 runs, so that no launch from Python is in them; `floor` is the bytes that must
be moved over the bandwidth of a large copy on the same card (what is small stays in the cache and
may be faster). Beside each stand the PyTorch reference, which computes the same, and
`torch.compile` of that. A kernel earns its place in the default path only where its verdict is
"faster". Needs an NVIDIA GPU, PyTorch with CUDA, Triton and cuda-core.
Uploading photos and tables is not timed. Writes `kernels.json`, as it goes, and `kernels.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._kernel_cases import Case, kernel_cases
from diffveil_kernels.calls import Call
from diffveil_kernels.errors import KernelError

__all__ = ["Record", "check", "main", "measure", "measure_apart", "measure_here", "missing"]

_RUNS = 20  # in one graph
_REPEATS = 30
_MARGIN = 1.05  # a kernel this much faster than the best other way is called faster

Record = dict[str, Any]
Launch = Callable[[Sequence[Call]], None]


def missing() -> str | None:
    """Why nothing can be measured here, in words; None if it can."""
    packages = [name for name in ("triton", "cuda.core") if not _there(name)]
    if packages:
        return f"{', '.join(packages)} not installed: pip install 'diffveil[export,kernels]'"
    if not torch.cuda.is_available():
        return "no CUDA device, or a PyTorch built without CUDA"
    return None


def check(case: Case, launch: Launch) -> tuple[bool, float]:
    """Run a case once; whether it is right, and the largest difference from NumPy's result."""
    case.out.zero_()
    case.prepare()
    launch(case.calls)
    actual = case.out.cpu().numpy().astype(np.float64)
    # Through float64 a NaN shows up as a difference that is not small.
    difference = float(np.abs(actual - case.expected.astype(np.float64)).max())
    return difference <= case.tolerance, difference


def measure(
    cases: Sequence[Case], launches: dict[str, Launch], *, save: Callable[[list[Record]], object]
) -> list[Record]:
    """Check and time cases on the current CUDA device.

    Args:
        cases: On that device.
        launches: Ways to launch our kernels, by name; the first is timed.
        save: Told all records after each case.
    """
    bandwidth = _bandwidth()
    records: list[Record] = []
    for case in cases:
        record: Record = {"case": case.name, "bytes": case.bytes, "correct": False}
        record["floor_us"] = 1e6 * case.bytes / bandwidth
        try:
            _measure(case, launches, record)
        except Exception as error:  # whatever a kernel that no GPU has run may cause
            record |= {"correct": False, "problem": f"{type(error).__name__}: {error}"[:300]}
        records.append(record)
        save(records)
    return records


def _measure(case: Case, launches: dict[str, Launch], record: Record) -> None:
    """Fill the record of one case."""
    checks = {name: check(case, launch) for name, launch in launches.items()}
    record["difference"] = {name: difference for name, (_, difference) in checks.items()}
    if not all(right for right, _ in checks.values()):
        record["problem"] = f"wrong by {record['difference']}"
        return
    launch = next(iter(launches.values()))
    record["ours_us"] = _microseconds(partial(launch, case.calls))
    for name, way in (("torch", case.plain), ("compiled", torch.compile(case.plain))):
        record[f"{name}_us"], problem = _tried(way)
        if problem:
            record[f"{name}_problem"] = problem
    record |= _ratios(record)
    record["correct"] = True


def measure_here(cases: Sequence[Case], save: Callable[[list[Record]], object]) -> list[Record]:
    """`measure` with the kernels compiled for this GPU and launched both ways.

    Raises:
        KernelError: They cannot be compiled or loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        launches = {"cuda-core": _by_cuda_core(Path(folder)), "triton": _by_triton()}
        return measure(cases, launches, save=save)


def measure_apart(batch: int, size: int, photo: int) -> tuple[list[Record], str]:
    """`main` in a process of its own: a kernel that loses the device takes nothing else with it.

    Returns:
        The records there are, and why there are no more, if there should be.
    """
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--batch", str(batch), "--size", str(size), "--photo", str(photo)]
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.kernels", "--out", folder, *sizes],
            capture_output=True,
            text=True,
            check=False,
        )
        file = Path(folder) / "kernels.json"
        records: list[Record] = []
        if file.exists():
            records = json.loads(file.read_text(encoding="utf-8"))["kernels"]
    told = child.stderr.strip().splitlines() or [f"ended with status {child.returncode}"]
    return records, told[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels"))
    parser.add_argument("--batch", type=int, default=4, help="faces (default: 4)")
    parser.add_argument("--size", type=int, default=512, help="side of a crop (default: 512)")
    parser.add_argument("--photo", type=int, default=2048, help="side of a photo (default: 2048)")
    args = parser.parse_args(arguments)
    problem = missing()
    if problem is not None:
        print(f"benchmarks.kernels measures on an NVIDIA GPU; here: {problem}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    machine = _machine()

    def save(records: list[Record]) -> None:
        text = json.dumps({"machine": machine, "kernels": records}, indent=1)
        partial_file = args.out / ".kernels.json.new"
        partial_file.write_text(text + "\n", encoding="utf-8")
        partial_file.replace(args.out / "kernels.json")
        (args.out / "kernels.md").write_text(table(machine, records), encoding="utf-8")
        print(json.dumps(records[-1]))

    cases = kernel_cases("cuda", batch=args.batch, size=args.size, photo=args.photo)
    try:
        records = measure_here(cases, save)
    except KernelError as error:
        print(f"benchmarks.kernels: {error}", file=sys.stderr)
        return 1
    return 0 if all(record["correct"] for record in records) else 1


def table(machine: Record, records: Sequence[Record]) -> str:
    """The records as Markdown."""
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, "
        f"triton {machine['triton']}; microseconds",
        "",
        "| case | MB | floor | ours | ours/floor | torch/ours | compiled/ours | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        columns = [r["case"], f"{r['bytes'] / 1e6:.2f}", f"{r['floor_us']:.1f}"]
        if r["correct"]:
            columns.append(f"{r['ours_us']:.1f}")
            ratios = (r["over_floor"], r["torch_over_ours"], r["compiled_over_ours"])
            columns += ["–" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            columns.append(r["verdict"])
        else:
            columns += ["–"] * 4 + [f"FAILED: {r['problem']}"]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def _ratios(record: Record) -> Record:
    """Ours against the floor and against the other ways."""
    ours = record["ours_us"]
    others = {name: record[f"{name}_us"] for name in ("torch", "compiled")}
    best = min((t for t in others.values() if t is not None), default=None)
    faster = best is not None and best > _MARGIN * ours
    return {
        "over_floor": ours / record["floor_us"],
        "torch_over_ours": others["torch"] and others["torch"] / ours,
        "compiled_over_ours": others["compiled"] and others["compiled"] / ours,
        "verdict": "faster" if faster else "not faster: leave it out",
    }


def _by_triton() -> Launch:
    from diffveil_kernels.jit import ops

    return ops.run


def _by_cuda_core(folder: Path) -> Launch:
    """Kernels compiled ahead of time for this GPU, launched on PyTorch's stream."""
    from diffveil_kernels.aot import compile_kernels
    from diffveil_kernels.launch import CudaCore, KernelLauncher
    from diffveil_kernels.specs import TARGETS

    device = CudaCore(torch.cuda.current_device())
    fitting = [t for t in TARGETS if t <= device.capability and t // 10 == device.capability // 10]
    compile_kernels(folder, fitting[-1:] or [TARGETS[0]])
    launcher = KernelLauncher(folder, device)

    class Stream:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, torch.cuda.current_stream().cuda_stream)

    def launch(calls: Sequence[Call]) -> None:
        launcher.run([replace(call, arguments=_addresses(call)) for call in calls], Stream())

    return launch


def _addresses(call: Call) -> tuple[Any, ...]:
    return tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in call.arguments)


def _tried(way: Callable[[], object]) -> tuple[float | None, str | None]:
    """Its time, or what kept it from running: ours is timed even where another way fails."""
    try:
        return _microseconds(way), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[:300]


def _microseconds(way: Callable[[], object]) -> float:
    """Median time of one run within a CUDA graph of many."""
    stream: Any = torch.cuda.Stream  # has no types
    side = stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            way()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(_RUNS):
            way()
    return _median(graph.replay) / _RUNS


def _median(run: Callable[[], object]) -> float:
    """Median microseconds of a run, by events."""
    event: Any = torch.cuda.Event  # has no types
    times: list[float] = []
    for _ in range(_REPEATS):
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def _bandwidth() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / (1e-6 * _median(lambda: target.copy_(source)))


def _machine() -> Record:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda-core": _version("cuda-core"),
    }


def _driver() -> str:
    """The driver's version, as it names itself."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return next((word for word in text.split() if word[:1].isdigit() and "." in word), "unknown")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


if __name__ == "__main__":
    sys.exit(main())
