"""A stand-in for the `tensorrt` module: the names and habits of its Python interface, no compiler.

TensorRT itself cannot be installed where there is no GPU. These classes carry the names that
TensorRT 10.3 and 11 document; what they return lets tests see what a builder was asked for.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir

__all__ = ["fake_tensorrt"]


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None: ...


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 8
    BF16 = 6

    def __str__(self) -> str:
        return f"DataType.{self.name}"


class BuilderFlag(enum.IntEnum):
    REFIT = 4
    TF32 = 7
    STRIP_PLAN = 20
    WEIGHT_STREAMING = 19


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class CreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"+"


class OptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [list(min), list(opt), list(max)]


class BuilderConfig:
    def __init__(self) -> None:
        self.flags = ["TF32"]
        self.pools: dict[str, int] = {}
        self.profiles: list[OptimizationProfile] = []
        self.cache: TimingCache | None = None
        self.progress_monitor: Any = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.append(flag.name)

    def clear_flag(self, flag: BuilderFlag) -> None:
        if flag.name in self.flags:
            self.flags.remove(flag.name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.pools[pool.name] = pool_size

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        return TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.cache = cache
        return not cache.data.startswith(b"other GPU")

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class Network:
    def __init__(self, flags: int) -> None:
        self.creation_flags = flags
        self.tensors: dict[str, list[Any]] = {"inputs": [], "outputs": []}

    num_inputs = property(lambda self: len(self.tensors["inputs"]))
    num_outputs = property(lambda self: len(self.tensors["outputs"]))

    def get_input(self, index: int) -> Any:
        return self.tensors["inputs"][index]

    def get_output(self, index: int) -> Any:
        return self.tensors["outputs"][index]


class ParserError:
    def desc(self) -> str:
        return "Assertion failed: no importer registered for op"

    def node_name(self) -> str:
        return "node_7"

    def node_operator(self) -> str:
        return "Blur"


_TYPES = {1: DataType.FLOAT, 10: DataType.HALF, 7: DataType.INT64, 16: DataType.BF16}


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self.network, self.num_errors = network, 0

    def parse_from_file(self, path: str) -> bool:
        model = ir.load(path)
        if any(node.op_type == "Blur" for node in model.graph):
            self.num_errors = 1
            return False
        sides = {"inputs": model.graph.inputs, "outputs": model.graph.outputs}
        for side, values in sides.items():
            for value in values:
                assert value.shape is not None
                assert value.dtype is not None
                shape = tuple(d if isinstance(d, int) else -1 for d in value.shape)
                dtype = _TYPES[int(value.dtype)]
                self.network.tensors[side].append(
                    SimpleNamespace(name=value.name, shape=shape, dtype=dtype)
                )
        return True

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class Builder:
    """Its engines are JSON of what it was asked for; `fail` makes it refuse, as the real one."""

    fail = False
    on_step: Any = None

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> Network:
        return Network(flags)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig()

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 4)
        for step in range(4):
            if self.on_step is not None:
                self.on_step(step)
            if not monitor.step_complete("Building engine", step):
                self.logger.log(Severity.ERROR, "Build canceled by user")
                return None
        monitor.phase_finish("Building engine")
        if self.fail:
            self.logger.log(Severity.ERROR, "Error Code 10: could not find any implementation")
            return None
        asked = {
            "creation_flags": network.creation_flags,
            "flags": config.flags,
            "pools": config.pools,
            "profiles": [p.shapes for p in config.profiles],
            "cache": None if config.cache is None else config.cache.data.decode(),
        }
        return json.dumps(asked, sort_keys=True).encode()


def fake_tensorrt(version: str) -> Any:
    """The module as of `version`; from 11 on there is no flag for strong typing."""
    old = int(version.partition(".")[0]) < 11

    class FreshBuilder(Builder):
        pass

    def flags() -> Iterator[tuple[str, Any]]:
        if old:
            yield "NetworkDefinitionCreationFlag", CreationFlag

    return SimpleNamespace(
        __version__=version,
        Builder=FreshBuilder,
        BuilderFlag=BuilderFlag,
        DataType=DataType,
        ILogger=ILogger,
        IProgressMonitor=IProgressMonitor,
        MemoryPoolType=MemoryPoolType,
        OnnxParser=OnnxParser,
        **dict(flags()),
    )
