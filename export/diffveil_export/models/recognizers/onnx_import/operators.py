"""The ONNX operators that an imported recognizer may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from diffveil_export.models.recognizers.onnx_import.elementwise import ELEMENTWISE
from diffveil_export.models.recognizers.onnx_import.layout import LAYOUT
from diffveil_export.models.recognizers.onnx_import.neural import NEURAL
from diffveil_export.models.recognizers.onnx_import.values import Operation, View

__all__ = ["OPERATORS"]

OPERATORS: Mapping[str, Callable[[View], Operation]] = {**ELEMENTWISE, **LAYOUT, **NEURAL}
"""Builders by type of operator: each reads a node's attributes and constants once, and returns
what the node does, in operators that are differentiable and that PyTorch can trace."""
