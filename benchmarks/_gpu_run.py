"""One run of the GPU benchmark: what is checked, built and timed, and how it is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import kernels
from benchmarks._gpu_flops import counted_flops
from benchmarks._gpu_timing import timed
from benchmarks._gpu_torch import DTYPES, Mode, matmul_ceiling, torch_device, wait_for
from benchmarks._kernel_cases import kernel_cases
from benchmarks._results import Recorder
from benchmarks._timing import resident_bytes
from diffveil.bundle import Bundle
from diffveil.engines import BACKENDS, Backend, Engine, Programs, select_backend
from diffveil.engines._cuda import Device
from diffveil.engines.tensorrt import MODULES
from diffveil.errors import DiffveilError
from diffveil.golden import judge_for
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.plans import Plan, Preset
from diffveil.presets import PRESETS
from diffveil_export.engines.builder import BuildOptions, build_engines
from diffveil_export.engines.trt_api import load_builder
from diffveil_export.verify import random_inputs

__all__ = ["EXCLUDED", "GpuRun", "TimeIsUp", "present_gpu"]

EXCLUDED = "loading, photos and files: calls on prepared crops, from host memory to host memory"

INCLUDED = "guidance of all faces at every guided step, as if none became strange, or known, enough"


class TimeIsUp(Exception):
    """The run's time is spent: what is missing is measured when it is started again."""


@dataclass(eq=False)
class GpuRun:
    """One run.

    Attributes:
        recorder: Where results go.
        seconds: Time for each case.
        batches: Faces of a call.
        done: Case and provider of what need not be measured.
        until: When to begin no further case, by `time.monotonic`.
        say: Told what begins.
        presets: Names of the presets that are timed.
        ceiling: Operations a second that the device reaches in a large matrix product.
    """

    recorder: Recorder
    seconds: float
    batches: tuple[int, ...]
    done: set[tuple[str, str]]
    until: float
    say: Callable[[str], None]
    presets: tuple[str, ...] = tuple(PRESETS)
    ceiling: float | None = field(default=None, init=False)

    def measure_ceiling(self, dtype: str, side: int) -> None:
        """How many operations a second the device reaches: measured in every run."""
        self.say("measuring the ceiling")
        device = torch_device()
        product, flops = matmul_ceiling(device, DTYPES[dtype], side)
        rates = flops / timed(product, min(self.seconds, 1.0), wait_for(device)) / 1e9
        self.ceiling = float(np.max(rates))  # others may have held it up, none speeds it
        name = f"ceiling/matrix product {side}"
        self.recorder.add(name, f"PyTorch {device}", "rate", "TFLOP/s", rates)

    def build(self, bundle: Bundle) -> None:
        """Engines of every builder that is installed, for the GPU that is here."""
        options = BuildOptions(batch=tuple(sorted({1, *self.batches}))[-3:])
        for name in MODULES:
            self._in_time()
            self.say(f"building engines of {name}")
            try:
                build_engines(bundle, load_builder(name), options)
            except DiffveilError as error:
                self.recorder.not_run("build/engines", _ours(name), str(error)[:2000])

    def backends(self, bundle: Bundle, names: list[str] | None) -> Iterator[Backend]:
        """Those that can run here and compute what they should; results say why others do not."""
        judge = judge_for(bundle)
        for name in names or BACKENDS:
            case = "correctness/golden data"
            self.say(f"checking {name}")
            selection = select_backend(name, bundle)
            if selection.backend is None:
                why = selection.reasons[0].why
                self.say(f"  {name} is absent: {why}")
                self.recorder.not_run(case, _ours(name), why)
                continue
            verdict = judge(selection.backend)
            self.recorder.add(
                case, _ours(name), "passed", "share", [float(verdict.ok)], detail=verdict.why[:2000]
            )
            self.say(f"  {name}: {verdict.why}")
            if verdict:
                yield selection.backend

    def kernels(self, batch: int, size: int, photo: int) -> None:
        """Every kernel: held against NumPy, then timed beside PyTorch and its compiler."""
        why = kernels.missing()
        # For their names: a process of its own puts them on the GPU.
        cases = kernel_cases("cpu", batch=batch, size=size, photo=photo)
        wanted = [c for c in cases if (f"kernel/{c.name}", "diffveil kernel") not in self.done]
        records: list[dict[str, Any]] = []
        if why is None and wanted:
            self._in_time()
            self.say("kernels")
            records, why = kernels.measure_apart(batch, size, photo)
        names = {case.name for case in wanted}
        for record in records:
            if record["case"] in names:
                self._keep_kernel(record)
                names.discard(record["case"])
        if names and why:
            self.say(f"  kernels are not run: {why}")
        for name in sorted(names):
            self.recorder.not_run(
                f"kernel/{name}", "diffveil kernel", (why or "")[:2000], absent=not records
            )

    def programs(self, bundle: Bundle, backend: Backend) -> None:
        """Every program alone."""
        for name in bundle.manifest.programs:
            case = f"program/{name}"
            wanted = [b for b in self.batches if not self._is_done(_of(case, b), backend.name)]
            if not wanted:
                continue
            before = _memory()
            try:
                engine = backend.load(bundle, name)
            except DiffveilError as error:
                self.recorder.not_run(case, _ours(backend.name), str(error)[:2000])
                continue
            cost = bundle.program(name).cost
            for batch in wanted:
                flops = None if cost is None else float(cost.flops * batch)
                call = partial(engine.run, **_feed(engine, bundle, batch))
                self._time(case, _ours(backend.name), batch, call, flops=flops, before=before)
            engine.close()

    def operations(self, bundle: Bundle, backend: Backend) -> None:
        """Whole operations on crops with every preset."""
        who, before = _ours(backend.name), _memory()
        with Programs(bundle, backend) as programs:
            operations = FaceOperations(programs)
            for preset in (PRESETS[name] for name in self.presets):
                for batch in self.batches:
                    for name, way in _ways(preset, bundle.image_size, batch).items():
                        case = f"{name}/{preset.name}"
                        if self._is_done(_of(case, batch), backend.name):
                            continue
                        flops = counted_flops(bundle, way)
                        call = partial(way, operations)
                        facts: Any = {"preset": preset.name, "includes": INCLUDED}
                        self._time(case, who, batch, call, flops=flops, before=before, **facts)

    def pytorch(
        self,
        label: str,
        cases: Iterator[tuple[str, Mode, int, Callable[[], object]]],
        device: torch.device,
    ) -> None:
        """What PyTorch does beside us."""
        for name, mode, batch, call in cases:
            who = f"{label}, PyTorch {mode}"
            self._time(f"{name}/{label}", who, batch, call, wait=wait_for(device))

    def _time(
        self,
        case: str,
        provider: str,
        batch: int,
        call: Callable[[], object],
        *,
        flops: float | None = None,
        before: int | None = None,
        wait: Callable[[], object] = lambda: None,
        **config: Any,
    ) -> None:
        alone, case = case.startswith("program/"), _of(case, batch)
        if (case, provider) in self.done:
            return
        self._in_time()
        self.say(f"{provider}: {case}")
        counts = {"fewest": 5, "warm_up": 3} if alone else {"fewest": 3, "warm_up": 2}
        try:
            spent = timed(call, self.seconds, wait, **counts)
        except (DiffveilError, RuntimeError) as error:  # RuntimeError: PyTorch's out of memory
            told = str(error).splitlines() or [""]
            why = f"{type(error).__name__}: {told[0][:300]}"
            self.recorder.not_run(case, provider, why, faces=batch, **config)
            return
        config |= {"faces": batch, "p90": float(np.quantile(spent, 0.9)) / batch}
        add = partial(self.recorder.add, case, provider)
        add("time a face", "ms", spent / batch, **config, excluded=EXCLUDED)
        add("throughput", "faces/s", 1000 * batch / spent, **config)
        if flops is not None:
            rates = flops / spent / 1e9
            add("rate", "TFLOP/s", rates, **config)
            if self.ceiling:
                add("of the ceiling", "share", rates / self.ceiling, **config)
        now = _memory()
        if before is not None and now is not None:
            add("memory", "MiB", [max(0, now - before) / 2**20], **config)

    def _keep_kernel(self, record: dict[str, Any]) -> None:
        case, detail = f"kernel/{record['case']}", {"bytes": record["bytes"]}
        if not record["correct"]:
            why = f"FAILED: {record['problem']}"
            self.recorder.not_run(case, "diffveil kernel", why[:2000], **detail)
            return
        detail["verdict"] = record["verdict"]
        add = partial(self.recorder.add, case)
        for key, who in (
            ("ours", "diffveil kernel"),
            ("torch", "PyTorch"),
            ("compiled", "torch.compile"),
        ):
            if record[f"{key}_us"] is None:
                self.recorder.not_run(case, who, record.get(f"{key}_problem", ""), **detail)
            else:
                add(who, "time", "µs", [record[f"{key}_us"]], **detail)
        add("diffveil kernel", "time over the memory floor", "×", [record["over_floor"]], **detail)

    def _is_done(self, case: str, backend: str) -> bool:
        return (case, _ours(backend)) in self.done

    def _in_time(self) -> None:
        if time.monotonic() > self.until:
            raise TimeIsUp


def present_gpu() -> Device | None:
    """The first GPU, through its driver; None where there is none.

    Raises:
        DiffveilError: PyTorch sees a GPU that we do not: a package is missing.
    """
    try:
        return Device()
    except DiffveilError:
        if torch.cuda.is_available():
            raise
    return None


def _of(case: str, batch: int) -> str:
    return f"{case}, {batch} at once"


def _ours(backend: str) -> str:
    return f"diffveil {backend}"


def _ways(preset: Preset, size: int, batch: int) -> dict[str, Callable[[FaceOperations], object]]:
    """The operations of a preset on crops of a size; recover has the inversion before it.

    To random weights all faces are one: margins, which end guidance early, and redraws are left
    out.
    """
    rng = np.random.default_rng(batch)
    crops = rng.uniform(-1, 1, (batch, 3, size, size)).astype(np.float32)
    keys = [NoiseKey.from_seed(face) for face in range(batch)]
    anonymize, hide = _guided_throughout(preset.anonymize), _guided_throughout(preset.hide)

    def recovered(operations: FaceOperations) -> object:
        inversion = preset.recovery
        return operations.recover(*operations.invert(crops, inversion), inversion)

    return {
        "anonymize": lambda operations: operations.anonymize(crops, anonymize, keys=keys),
        "hide": lambda operations: operations.hide(crops, hide, keys=keys),
        "recover": recovered,
    }


def _guided_throughout(plan: Plan) -> Plan:
    otherwise = None if plan.otherwise is None else _guided_throughout(plan.otherwise)
    guidance = replace(plan.guidance, margin=None)
    return replace(plan, guidance=guidance, redraws=0, otherwise=otherwise)


def _memory() -> int | None:
    """Bytes in use on the GPU, or by this process where there is none."""
    device = present_gpu()
    if device is None:
        return resident_bytes()
    free, total = device.free_and_total()
    return total - free


def _feed(engine: Engine, bundle: Bundle, batch: int) -> dict[str, Any]:
    spec, generator = engine.program, torch.Generator().manual_seed(batch)
    inputs = random_inputs(spec, bundle.dimensions, batch, generator)
    return {t.name: x.numpy() for t, x in zip(spec.inputs, inputs, strict=True)}
