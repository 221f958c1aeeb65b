"""Edits of ONNX graphs, one pass a module."""
