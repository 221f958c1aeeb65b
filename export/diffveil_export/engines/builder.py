"""From programs to engines: restore the weights, compile, publish; what is unchanged is kept."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from diffveil.bundle import Bundle
from diffveil.engines.records import (
    EngineRecord,
    ShapeRange,
    engine_folder,
    program_digest,
    read_records,
)
from diffveil.errors import EngineError, OptionError
from diffveil.programs import ALL_PROGRAMS
from diffveil_export.engines.profiles import BatchRange, profile_of
from diffveil_export.engines.progress import BuildProgress, cancel_on_interrupt
from diffveil_export.engines.records import publish, reason_to_build
from diffveil_export.engines.trt_api import PRESENT, Built, NativeOptions, TensorRTBuilder

__all__ = ["RECIPE", "BuildOptions", "BuildResult", "WeightForm", "build_engines"]

RECIPE = 2
"""Revision of the way from program to engine: raise it when that way changes."""

WeightForm = Literal["folded", "stored"]
WEIGHT_FORMS: tuple[WeightForm, ...] = get_args(WeightForm)

_MAX_MEMORY_MIB = 1 << 20


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        targets: Compute capabilities (`89`, `8.9`, `sm89`) or `present`.
        batch: One to three batch sizes: smallest, tuned for, largest.
        programs: Names of programs.
        weights: `folded` restores compactly stored weights to the dtype that they are computed
            with; `stored` leaves int8 weights in the engine: smaller, restored by the engine.
            Weights in four bits are restored either way.
        native: Options of the builder itself.
        force: Build what is up to date too.
        dry_run: Only say what would be built.

    Raises:
        OptionError: An option is out of range; all of them are named.
    """

    targets: tuple[str, ...] = (PRESENT,)
    batch: tuple[int, ...] = (1, 4, 8)
    programs: tuple[str, ...] | None = None
    weights: WeightForm = "folded"
    native: NativeOptions = field(default_factory=NativeOptions)
    force: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"programs: '{name}' is none of {', '.join(ALL_PROGRAMS)}"
            for name in self.programs or ()
            if name not in ALL_PROGRAMS
        ]
        named = self.programs
        if named is not None and (not named or len(set(named)) != len(named)):
            problems.append("programs: expected one or more different programs")
        if self.weights not in WEIGHT_FORMS:
            problems.append(f"weights: received '{self.weights}', expected one of {WEIGHT_FORMS}")
        memory = self.native.memory_mib
        if memory is not None and not 1 <= memory <= _MAX_MEMORY_MIB:
            problems.append(f"memory: received {memory} MiB, expected 1…{_MAX_MEMORY_MIB}")
        try:
            BatchRange.of(self.batch)
        except OptionError as error:
            problems.append(str(error))
        if problems:
            raise OptionError("; ".join(problems))


@dataclass(frozen=True)
class BuildResult:
    """What became of one program for one target.

    Attributes:
        status: `built`, `cached` (it was up to date), or `planned` (a dry run would build it).
        reason: Why it is built; empty where it is cached.
        path: The engine's file.
        record: Its record; None where it is planned.
    """

    program: str
    target: str
    status: Literal["built", "cached", "planned"]
    reason: str
    path: Path
    record: EngineRecord | None


def build_engines(
    bundle: Bundle,
    builder: TensorRTBuilder,
    options: BuildOptions,
    *,
    done: Callable[[BuildResult], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[BuildResult, ...]:
    """Compile programs of a bundle into engines beside its manifest.

    A program that fails does not keep the others from being built.

    Args:
        bundle: The bundle.
        builder: What compiles.
        options: What to compile.
        done: Told each result when there is one.
        progress: Told what is being built and how much of how much of it is done.

    Returns:
        One result for each target and program.

    Raises:
        OptionError: An option does not fit the builder, or the bundle.
        BundleError: A program's files are damaged.
        EngineError: Programs could not be built; each is named with what the builder said.
        KeyboardInterrupt: Ctrl-C; finished engines are in place, others as they were.
        OSError: The bundle's folder cannot be written.
    """
    targets = builder.resolve_targets(options.targets)
    if options.native.timing_cache is not None and builder.ahead_of_time:
        raise OptionError(
            "timing-cache: TensorRT-RTX has none; it compiles kernels where the engine runs and "
            "keeps them in a runtime cache there"
        )
    results: list[BuildResult] = []
    failures: list[str] = []
    for target in targets:
        for program in options.programs or bundle.manifest.programs:

            def report(at: int, total: int, label: str = f"{program} {target}") -> None:
                if progress is not None:
                    progress(label, at, total)

            try:
                result = _build(bundle, builder, program, target, options, report)
            except EngineError as error:
                failures.append(f"{program} for {target}: {error}")
                continue
            results.append(result)
            if done is not None:
                done(result)
    if failures:
        built = len(results)
        raise EngineError(
            f"{len(failures)} of {built + len(failures)} engines could not be built:\n  "
            + "\n  ".join(failures)
        )
    return tuple(results)


def _build(
    bundle: Bundle,
    builder: TensorRTBuilder,
    program: str,
    target: str,
    options: BuildOptions,
    report: Callable[[int, int], None],
) -> BuildResult:
    folder = engine_folder(bundle, builder.backend, builder.version, target)
    batch = BatchRange.of(options.batch)

    def profile(network: Any) -> dict[str, ShapeRange]:
        return profile_of(ALL_PROGRAMS[program], bundle.dimensions, batch, network)

    def record(shapes: dict[str, ShapeRange], built: Built | None, seconds: float) -> EngineRecord:
        engine = b"" if built is None else built.engine
        return EngineRecord(
            program=program,
            program_sha256=program_digest(bundle, program),
            backend=builder.backend,
            version=builder.version,
            target=target,
            recipe=RECIPE,
            profile=shapes,
            inputs={} if built is None else built.inputs,
            outputs={} if built is None else built.outputs,
            flags=_flags(options),
            file=f"{program}.engine",
            sha256=sha256(engine).hexdigest(),
            bytes=len(engine),
            seconds=round(seconds, 2),
        )

    declared = {t.name: t.shape(bundle.dimensions) for t in ALL_PROGRAMS[program].inputs}
    shapes = profile(
        {n: [-1 if isinstance(s, str) else s for s in shape] for n, shape in declared.items()}
    )
    wanted = record(shapes, None, 0.0)
    reason = "forced" if options.force else reason_to_build(folder, wanted)
    path = folder / wanted.file
    if reason is None:
        return BuildResult(program, target, "cached", "", path, read_records(folder)[program])
    if options.dry_run:
        return BuildResult(program, target, "planned", reason, path, None)

    source = bundle.program_path(program)
    begun = time.monotonic()
    progress = BuildProgress(report)
    folder.mkdir(parents=True, exist_ok=True)
    with cancel_on_interrupt(progress), _restored(source, folder, options) as model:
        built = builder.build(model, target, options.native, profile, progress)
    finished = record(shapes, built, time.monotonic() - begun)
    publish(folder, finished, built.engine)
    return BuildResult(program, target, "built", reason, path, finished)


def _flags(options: BuildOptions) -> dict[str, bool | int | str | None]:
    """What of the options changes the engine and is not in another field of the record."""
    return {
        "weights": options.weights,
        "memory_mib": options.native.memory_mib,
        "refittable": options.native.refittable,
        "strip_weights": options.native.strip_weights,
        "weight_streaming": options.native.weight_streaming,
    }


@contextmanager
def _restored(source: Path, folder: Path, options: BuildOptions) -> Iterator[Path]:
    """The ONNX file to parse: the program's own, or one with its weights folded.

    Blocks of four bits are folded even where weights are to stay as stored: parsers read them for
    matrices only. The folded one is written, for the parser maps weights from a file and one
    message of protobuf holds no more than 2 GiB.

    Raises:
        OptionError: The engine is to be filled from the bundle later, which has no such weights.
    """
    import onnx_ir as ir

    from diffveil_export.passes.fold_weights import FoldWeights

    model = ir.load(source)
    if not FoldWeights(only_blocks=options.weights == "stored")(model).modified:
        yield source
        return
    if options.native.strip_weights:
        raise OptionError(
            f"strip-weights: the bundle stores weights of program '{source.stem}' compactly, so an "
            "engine of restored ones could not be filled from it: give `--weights stored` if "
            "none is in four bits, or build from a bundle that was exported with `--weights "
            "float32` or `--precision float16`"
        )
    with tempfile.TemporaryDirectory(
        dir=folder, prefix=".folded-", ignore_cleanup_errors=True
    ) as workspace:
        file = Path(workspace) / source.name
        ir.save(model, file, external_data="weights.bin")
        yield file
