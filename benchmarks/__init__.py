"""Measurements of diffveil: `python -m benchmarks.quality`, on any folder of faces."""
