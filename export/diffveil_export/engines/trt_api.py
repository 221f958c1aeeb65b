"""Everything in which TensorRT-RTX, TensorRT 10.3+ and TensorRT 11 differ for a builder.

|                 | TensorRT-RTX                     | TensorRT 10.3+        | TensorRT 11        |
|-----------------|----------------------------------|-----------------------|--------------------|
| module          | `tensorrt_rtx`                   | `tensorrt`            | `tensorrt`         |
| strong typing   | always                           | a creation flag       | always, no flag    |
| target GPU      | any of its compute capabilities  | the GPU that is here  | the same           |
| timing cache    | none                             | a file                | a file             |

The rest of the interface that is used here has the same names in all three.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from diffveil.engines.device import present_target
from diffveil.engines.records import ShapeRange
from diffveil.engines.tensorrt import MODULES, message_logger
from diffveil.errors import BackendUnavailableError, EngineError, OptionError
from diffveil_export.engines.progress import BuildProgress

__all__ = ["BACKENDS", "PRESENT", "Built", "NativeOptions", "TensorRTBuilder", "load_builder"]

BACKENDS = MODULES
"""Module of each backend."""

PRESENT = "present"
"""Target: the GPU of this machine."""

_OLDEST = (10, 3)  # of TensorRT; TensorRT-RTX counts for itself
_TARGET = re.compile(r"(?:sm_?)?([1-9][0-9]{1,2})|([1-9][0-9]?)\.([0-9])")
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class NativeOptions:
    """What the builder itself is asked for.

    Attributes:
        memory_mib: Most scratch memory of the engine, in MiB; None leaves it to the builder.
        refittable: Weights can be replaced later.
        strip_weights: The engine is written without weights and must be refitted to run.
        weight_streaming: Weights may stay in host memory and be streamed to the GPU.
        timing_cache: File of measured kernels, read and rewritten; TensorRT only.
    """

    memory_mib: int | None = None
    refittable: bool = False
    strip_weights: bool = False
    weight_streaming: bool = False
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Built:
    """A serialised engine and the dtypes of its inputs and outputs."""

    engine: bytes
    inputs: dict[str, str]
    outputs: dict[str, str]


@dataclass
class TensorRTBuilder:
    """One of the three builders.

    Attributes:
        backend: `tensorrt-rtx` or `tensorrt`.
        trt: Its module.
        find_present: Names the GPU that is here, or gives None.
    """

    backend: str
    trt: Any
    find_present: Callable[[], str | None] = present_target
    _messages: list[str] = field(default_factory=list, repr=False)

    @property
    def version(self) -> str:
        """The builder's version, in full."""
        return str(self.trt.__version__)

    @property
    def ahead_of_time(self) -> bool:
        """Whether engines can be built for GPUs that are not here."""
        return self.backend == "tensorrt-rtx"

    def supported_targets(self) -> list[str]:
        """Compute capabilities that can be named; empty where only the present GPU can."""
        if not self.ahead_of_time:
            return []
        names = [n for n in vars(self.trt.ComputeCapability) if re.fullmatch(r"SM\d+", n)]
        return [f"sm{number}" for number in sorted(int(name[2:]) for name in names)]

    def resolve_targets(self, targets: Sequence[str]) -> list[str]:
        """Turn `89`, `8.9`, `sm89` and `present` into `sm89`.

        Raises:
            OptionError: A target is unknown, not this builder's, or repeated; all are named.
            BackendUnavailableError: The present GPU is asked for and there is none.
        """
        supported, problems, found = self.supported_targets(), [], []
        for target in targets:
            if target == PRESENT:
                found.append(self._present())
                continue
            match = _TARGET.fullmatch(target)
            name = f"sm{''.join(part for part in match.groups() if part)}" if match else None
            if not self.ahead_of_time:
                problems.append(
                    f"'{target}': TensorRT builds for the GPU of this machine only; leave --target "
                    f"out, or use --backend tensorrt-rtx, which builds for other GPUs"
                )
            elif name is None:
                problems.append(f"'{target}': expected a compute capability such as 89 or 12.0")
            else:
                found.append(name)
        if self.ahead_of_time:
            problems += [
                f"{name}: TensorRT-RTX {self.version} builds for {', '.join(supported)}"
                for name in found
                if name not in supported
            ]
        if not targets:
            problems.append("none are given")
        if len(set(found)) != len(found):
            problems.append("a target appears twice")
        if problems:
            raise OptionError("target: " + "; ".join(problems))
        return found

    def _present(self) -> str:
        target = self.find_present()
        if target is not None:
            return target
        way_out = (
            f"name GPUs instead, for example --target 86,89,120 "
            f"(of {', '.join(self.supported_targets())})"
            if self.ahead_of_time
            else "run this where the engine is to run, or use --backend tensorrt-rtx"
        )
        raise BackendUnavailableError(f"no NVIDIA GPU with a driver is here: {way_out}")

    def build(
        self,
        model: Path,
        target: str,
        options: NativeOptions,
        profile: Callable[[Mapping[str, Sequence[int]]], Mapping[str, ShapeRange]],
        progress: BuildProgress,
    ) -> Built:
        """Parse an ONNX file as a strongly typed network and compile it.

        Args:
            model: The file; weights beside it are found by the parser.
            target: Compute capability, `sm89`.
            options: Options of the builder.
            profile: Given the shapes of the network's inputs, says which shapes the engine takes.
            progress: Told how far the build is; may cancel it.

        Raises:
            OptionError: The timing cache is of another builder or GPU.
            EngineError: The parser or the builder refuses, with all that they said about it.
        """
        trt, self._messages = self.trt, []
        logger = message_logger(trt, self._messages)
        builder = trt.Builder(logger)
        network = builder.create_network(_creation_flags(trt))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(model)):
            errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
            raise EngineError(
                f"{self.backend} {self.version} cannot read the program: "
                + "; ".join(errors or self._messages or ["no reason was given"])
            )
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        shapes = profile({tensor.name: tuple(tensor.shape) for tensor in tensors})
        config = self._config(builder, target, options)
        config.progress_monitor = _monitor(trt, progress)
        ranges = builder.create_optimization_profile()
        for name, shape in shapes.items():
            ranges.set_shape(name, shape.min, shape.opt, shape.max)
        if config.add_optimization_profile(ranges) < 0:
            raise self._failed("refuses the shapes")
        cache = self._attach_timing_cache(config, options.timing_cache)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise self._failed("cannot build the program" + self._hint(options))
        if cache is not None and options.timing_cache is not None:
            _replace(options.timing_cache, bytes(config.get_timing_cache().serialize()))
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        return Built(
            bytes(memoryview(engine)),
            {tensor.name: _dtype(tensor) for tensor in tensors},
            {tensor.name: _dtype(tensor) for tensor in outputs},
        )

    def _config(self, builder: Any, target: str, options: NativeOptions) -> Any:
        trt = self.trt
        config = builder.create_builder_config()
        if options.memory_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.memory_mib << 20)
        flags = {
            "REFIT": options.refittable,
            "STRIP_PLAN": options.strip_weights,
            "WEIGHT_STREAMING": options.weight_streaming,
        }
        for name, wanted in flags.items():
            if wanted:
                config.set_flag(getattr(trt.BuilderFlag, name))
        # float32 stays float32: TF32's ten bits would not stand the golden check, nor recovery.
        config.clear_flag(trt.BuilderFlag.TF32)
        if self.ahead_of_time:
            config.num_compute_capabilities = 1
            capability = getattr(trt.ComputeCapability, target.upper())
            if not config.set_compute_capability(capability, 0):
                raise self._failed(f"refuses the target {target}")
        return config

    def _attach_timing_cache(self, config: Any, file: Path | None) -> Any:
        if file is None:
            return None
        cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise OptionError(
                f"timing cache '{file}' is damaged, or of another GPU or TensorRT: "
                "give a new file's name" + "".join(f"; {m}" for m in self._messages)
            )
        return cache

    def _hint(self, options: NativeOptions) -> str:
        if self.ahead_of_time and (options.refittable or options.strip_weights):
            return " (refittable and stripped engines can be built only where a GPU is)"
        return ""

    def _failed(self, what: str) -> EngineError:
        said = "; ".join(dict.fromkeys(self._messages)) or "it gave no reason"
        return EngineError(f"{self.backend} {self.version} {what}: {said}")


def load_builder(
    backend: str, *, import_trt: Callable[[str], Any] = import_module
) -> TensorRTBuilder:
    """Import a builder.

    Raises:
        OptionError: There is no such backend.
        BackendUnavailableError: It is not installed, or too old.
    """
    if backend not in BACKENDS:
        raise OptionError(f"backend: received '{backend}', expected one of {', '.join(BACKENDS)}")
    install = f"pip install 'diffveil[export,{backend}]'"
    try:
        trt = import_trt(BACKENDS[backend])
    except (ImportError, OSError) as error:  # OSError: a library of CUDA is missing
        raise BackendUnavailableError(
            f"backend '{backend}' cannot be imported ({error}): {install}"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", str(trt.__version__))[:2])
    if backend == "tensorrt" and version < _OLDEST:
        raise BackendUnavailableError(
            f"TensorRT {trt.__version__} is older than "
            f"{'.'.join(map(str, _OLDEST))}, which engines need: {install}"
        )
    return TensorRTBuilder(backend, trt)


def _creation_flags(trt: Any) -> int:
    # TensorRT 10 types weakly unless it is told not to; the others know nothing else.
    flag = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _monitor(trt: Any, progress: BuildProgress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes the builder's phases on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            progress.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            return progress.step(name, step)

        def phase_finish(self, name: str) -> None:
            progress.finish(name)

    return Monitor()


def _parser_error(error: Any) -> str:
    operator, name = error.node_operator(), error.node_name()
    where = f"node '{name}' ({operator}): " if operator or name else ""
    return f"{where}{error.desc()}"


def _dtype(tensor: Any) -> str:
    name = str(tensor.dtype).rpartition(".")[2]
    return _DTYPES.get(name, name.lower())


def _replace(file: Path, data: bytes) -> None:
    temporary = file.with_name(f".{file.name}.new")
    try:
        temporary.write_bytes(data)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
