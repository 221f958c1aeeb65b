"""The few words in which NumPy and PyTorch differ."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Array", "cast", "namespace", "span"]

Array = Any
"""A NumPy array or a PyTorch tensor; a function returns what it was given."""


def namespace(x: Array) -> Any:
    """The module whose functions take x."""
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


def cast(x: Array, dtype: str) -> Array:
    """x in another dtype, named as both modules name it."""
    if isinstance(x, np.ndarray):
        return x.astype(dtype)
    return x.to(getattr(namespace(x), dtype))


def span(count: int, like: Array) -> Array:
    """0 … count - 1, int64, on the device of `like`."""
    if isinstance(like, np.ndarray):
        return np.arange(count)
    return namespace(like).arange(count, device=like.device)
