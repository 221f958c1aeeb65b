"""Compiling a bundle's programs into engines, ahead of time. Nothing here needs PyTorch."""

from __future__ import annotations

from diffveil_export.engines.builder import BuildOptions, BuildResult, build_engines
from diffveil_export.engines.trt_api import TensorRTBuilder, load_builder

__all__ = [
    "BuildOptions",
    "BuildResult",
    "TensorRTBuilder",
    "build_engines",
    "load_builder",
]
