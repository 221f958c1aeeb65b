"""Recognizers that exist as ONNX files only, as differentiable PyTorch modules."""

from __future__ import annotations

from diffveil_export.models.recognizers.onnx_import.module import OnnxModule, load_onnx
from diffveil_export.models.recognizers.onnx_import.operators import OPERATORS
from diffveil_export.models.recognizers.onnx_import.parse import Graph, Node, read_graph

__all__ = ["OPERATORS", "Graph", "Node", "OnnxModule", "load_onnx", "read_graph"]
