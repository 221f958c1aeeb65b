"""Engines: a bundle's programs made executable, by one of several backends."""

from __future__ import annotations

from diffveil.engines._base import Array, Availability, Backend, Engine
from diffveil.engines._budget import MemoryBudget, parse_memory
from diffveil.engines._loop import Carry, Loop, Scheduled, WholeLoop
from diffveil.engines._pool import BackendWarning, Examine
from diffveil.engines._programs import Programs
from diffveil.engines._select import AUTO, BACKENDS, REFERENCE, Reason, Selection, select_backend
from diffveil.engines.onnxrt import ONNXRuntimeCPU
from diffveil.engines.onnxrt_cuda import ONNXRuntimeCUDA
from diffveil.engines.tensorrt import TensorRT

__all__ = [
    "AUTO",
    "BACKENDS",
    "REFERENCE",
    "Array",
    "Availability",
    "Backend",
    "BackendWarning",
    "Carry",
    "Engine",
    "Examine",
    "Loop",
    "MemoryBudget",
    "ONNXRuntimeCPU",
    "ONNXRuntimeCUDA",
    "Programs",
    "Reason",
    "Scheduled",
    "Selection",
    "TensorRT",
    "WholeLoop",
    "parse_memory",
    "select_backend",
]
