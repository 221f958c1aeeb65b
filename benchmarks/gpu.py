"""Every backend on one machine: first whether it computes what it should, then how fast.

    python -m benchmarks.gpu [--size sd1|tiny] [--out DIR] [--bundle DIR]

Makes a bundle of Stable Diffusion 1.x's size with random weights (speed does not depend on them),
holds every backend that can run here against its golden data, and times those that pass: each
program, and anonymize, hide and recover with each preset, at batch 1, 4 and 8. Beside them, in the
same run, the published recipe in PyTorch and a GAN of StyleGAN2-1024's size, eager and compiled.

Timed are calls on prepared crops, from host memory to host memory; loading, photos and files are
not. Exporting the full-size bundle takes 16 GiB of host memory and minutes; `--bundle` keeps it.
Where a GPU is, engines are built first. Without one it runs all the same, and says that its figures
are a CPU's. Needs the export extra. Results are written as they come: `gpu.json`, and at the end
`gpu.md` and `gpu.png`, in `--out`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._gpu_bundle import SIZES, make_bundle, random_components
from benchmarks._gpu_report import Results, Row
from benchmarks._gpu_timing import timed
from benchmarks._gpu_torch import (
    DTYPES,
    Mode,
    gan_cases,
    matmul_ceiling,
    paper_cases,
    torch_device,
    wait_for,
)
from benchmarks._timing import resident_bytes
from diffveil.bundle import Bundle
from diffveil.engines import BACKENDS, Backend, Programs, select_backend
from diffveil.engines._cuda import Device
from diffveil.engines.tensorrt import MODULES
from diffveil.errors import DiffveilError
from diffveil.golden import judge_for
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.presets import PRESETS
from diffveil_export.engines.builder import BuildOptions, build_engines
from diffveil_export.engines.trt_api import load_builder
from diffveil_export.verify import random_inputs

_PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "torch",
    "triton",
)


class Benchmark:
    """One run.

    Args:
        bundle: What is run.
        results: Where rows go.
        batches: Faces of a call.
        seconds: Time for each case.
        say: Told what begins.
    """

    def __init__(
        self,
        bundle: Bundle,
        results: Results,
        batches: tuple[int, ...],
        seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self.bundle, self.results = bundle, results
        self.batches, self.seconds, self.say = batches, seconds, say
        self.ceiling: float | None = None

    def measure_ceiling(self, dtype: str, side: int) -> None:
        """How many operations a second the device reaches in a large matrix product."""
        self.say("measuring the ceiling")
        device = torch_device()
        product, flops = matmul_ceiling(device, DTYPES[dtype], side)
        timing = timed(product, self.seconds, wait_for(device))
        self.ceiling = flops / (timing.p50_ms / 1000)
        self._add("ceiling", f"matmul {side}", f"PyTorch {device}", timing.record(1, flops))

    def backends(self, names: list[str] | None) -> Iterator[Backend]:
        """Those that can run here and compute what they should; rows say why others do not."""
        judge = judge_for(self.bundle)
        for name in names or BACKENDS:
            self.say(f"checking {name}")
            selection = select_backend(name, self.bundle)
            backend = selection.backend
            if backend is None:
                self._add(
                    "correctness", name, name, {"detail": f"not run: {selection.reasons[0].why}"}
                )
                continue
            verdict = judge(backend)
            self._add("correctness", name, name, {"ok": verdict.ok, "detail": verdict.why})
            if verdict:
                yield backend

    def build(self) -> None:
        """Engines of every builder that is installed, for the GPU that is here."""
        options = BuildOptions(batch=tuple(sorted({1, *self.batches}))[-3:])
        for name in MODULES:
            self.say(f"building engines of {name}")
            try:
                build_engines(self.bundle, load_builder(name), options)
            except DiffveilError as error:
                self._add("build", name, name, {"error": str(error)[:2000]})

    def programs(self, backend: Backend) -> None:
        """Every program alone."""
        for name in self.bundle.manifest.programs:
            before = _memory()
            try:
                engine = backend.load(self.bundle, name)
            except DiffveilError as error:
                self._add("program", name, backend.name, {"error": str(error)})
                continue
            cost = self.bundle.program(name).cost
            for batch in self.batches:
                self.say(f"{backend.name}: {name}, batch {batch}")
                inputs = random_inputs(
                    engine.program,
                    self.bundle.dimensions,
                    batch,
                    torch.Generator().manual_seed(batch),
                )
                feed = {
                    t.name: x.numpy() for t, x in zip(engine.program.inputs, inputs, strict=True)
                }
                flops = None if cost is None else float(cost.flops * batch)
                call = partial(engine.run, **feed)
                self._time("program", name, backend.name, batch, call, flops=flops, before=before)
            engine.close()

    def operations(self, backend: Backend) -> None:
        """Whole operations on crops with every preset."""
        size = self.bundle.image_size
        with Programs(self.bundle, backend) as programs:
            operations = FaceOperations(programs)
            for preset in PRESETS.values():
                for batch in self.batches:
                    rng = np.random.default_rng(batch)
                    crops = rng.uniform(-1, 1, (batch, 3, size, size)).astype(np.float32)
                    keys = [NoiseKey.from_seed(face) for face in range(batch)]

                    def recovered(crops: Any = crops, inversion: Any = preset.recovery) -> object:
                        return operations.recover(*operations.invert(crops, inversion), inversion)

                    ways: dict[str, Callable[[], object]] = {
                        "anonymize": partial(
                            operations.anonymize, crops, preset.anonymize, keys=keys
                        ),
                        "hide": partial(operations.hide, crops, preset.hide, keys=keys),
                        "recover": recovered,
                    }
                    for name, call in ways.items():
                        self.say(f"{backend.name}: {name} {preset.name}, batch {batch}")
                        self._time("operation", name, backend.name, batch, call, preset=preset.name)

    def pytorch(
        self,
        label: str,
        cases: Iterator[tuple[str, Mode, int, Callable[[], object]]],
        device: torch.device,
    ) -> None:
        """What PyTorch does beside us."""
        for name, mode, batch, call in cases:
            self.say(f"{label} {mode}: {name}, batch {batch}")
            self._time(
                "operation", name, f"{label}, PyTorch {mode}", batch, call, wait=wait_for(device)
            )

    def _time(
        self,
        kind: str,
        name: str,
        backend: str,
        batch: int,
        call: Callable[[], object],
        *,
        flops: float | None = None,
        before: int | None = None,
        preset: str | None = None,
        wait: Callable[[], object] = lambda: None,
    ) -> None:
        row: Row = {"batch": batch, "preset": preset}
        try:
            slow = kind == "operation"
            timing = timed(
                call,
                self.seconds,
                wait,
                fewest=3 if slow else 5,
                warm_up=2 if slow else 3,
            )
        except (DiffveilError, RuntimeError) as error:  # RuntimeError: PyTorch's out of memory
            row["error"] = str(error).splitlines()[0][:300]
        else:
            row |= timing.record(batch, flops, self.ceiling)
            row["ms_a_face"] = timing.p50_ms / batch
            now = _memory()
            if before is not None and now is not None:
                row["memory"] = max(0, now - before)
        self._add(kind, name, backend, row)

    def _add(self, kind: str, name: str, backend: str, row: Row) -> None:
        self.results.add({"kind": kind, "name": name, "backend": backend, **row})


def _device() -> Device | None:
    with suppress(DiffveilError):
        return Device()
    return None


def _memory() -> int | None:
    """Bytes in use on the GPU, or by this process where there is none."""
    device = _device()
    if device is None:
        return resident_bytes()
    free, total = device.free_and_total()
    return total - free


def _facts(bundle: Bundle, args: argparse.Namespace, command: str) -> Row:
    device = _device()
    versions: dict[str, str | None] = {"Python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    note = "Measured on a GPU."
    if device is None:
        note = (
            "No GPU was found: these figures are a CPU's. They show that everything runs, and say "
            "nothing about any GPU."
        )
    return {
        "device": platform.machine() if device is None else device.name,
        "driver": None if device is None else device.driver_version,
        "device_note": note,
        "gpu": device is not None,
        "versions": versions,
        "bundle": bundle.name,
        "precision": args.precision,
        "size": args.size,
        "command": command,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=list(SIZES), default="sd1")
    parser.add_argument("--tiny", action="store_const", const="tiny", dest="size", help="for a CPU")
    parser.add_argument("--bundle", type=Path, help="made there if there is none")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--precision", choices=list(DTYPES), help="default: float16; tiny: float32")
    parser.add_argument("--backends", type=lambda text: text.split(","), metavar="A,B")
    parser.add_argument("--batches", default="1,4,8", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3.0, help="a case (default: %(default)g)")
    parser.add_argument("--compiler", default="inductor", help="back end of torch.compile")
    parser.add_argument("--only", choices=("ours", "pytorch"), help="one half of the comparison")
    args = parser.parse_args(arguments)
    args.precision = args.precision or ("float32" if args.size == "tiny" else "float16")
    batches = tuple(int(batch) for batch in args.batches.split(","))
    command = " ".join(["python -m benchmarks.gpu", *(arguments or sys.argv[1:])])

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    size = SIZES[args.size]
    with tempfile.TemporaryDirectory() as folder:
        made = args.bundle or Path(folder) / "bundle"
        if not made.exists():
            make_bundle(random_components(size), made, Path(folder), args.precision, say)
        bundle = Bundle.load(made)
        results = Results(args.out, _facts(bundle, args, command))
        say(results.facts["device_note"])
        run = Benchmark(bundle, results, batches, args.seconds, say)
        run.measure_ceiling(args.precision, 256 if args.size == "tiny" else 8192)
        if args.only != "pytorch":
            if results.facts["gpu"]:
                run.build()
            for backend in run.backends(args.backends):
                run.programs(backend)
                run.operations(backend)
        if args.only != "ours":
            device, modes = torch_device(), ("eager", "compile")
            given: Any = (device, args.precision, modes, batches, args.compiler)
            run.pytorch("the paper's recipe", paper_cases(random_components(size), *given), device)
            run.pytorch("StyleGAN2 and e4e", gan_cases(size, *given), device)
        print(results.finish())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
