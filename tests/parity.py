"""Closeness with a derived tolerance: no worse than PyTorch's own rounding, times a small factor.

Instead of guessing a tolerance, a test computes the result three ways (float64, PyTorch in
float32, ours) and allows ours a few times the float32 result's distance from the float64 one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

__all__ = ["assert_close_to_reference", "in_float64"]


def in_float64(module: nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Outputs of a module in double precision; the module is left as it is."""
    double = copy.deepcopy(module).double()
    outputs = double(*(x.double() if x.is_floating_point() else x for x in inputs))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_close_to_reference(
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    actual: Sequence[NDArray[np.generic]],
    *,
    factor: float = 8,
) -> None:
    """Assert that `actual` are the outputs of `module`, about as exact as PyTorch's float32.

    Args:
        module: In float32.
        inputs: Its inputs.
        actual: What is to be judged, one array an output.
        factor: How many times PyTorch's own error is allowed.
    """
    reference = in_float64(module, inputs)
    single = module(*inputs)
    single = single if isinstance(single, tuple) else (single,)
    assert len(actual) == len(reference)
    for index, (ours, torch32, torch64) in enumerate(zip(actual, single, reference, strict=True)):
        exact = torch64.detach().numpy()
        assert ours.shape == exact.shape, f"output {index}: {ours.shape} is not {exact.shape}"
        assert ours.dtype == torch32.detach().numpy().dtype, f"output {index}: {ours.dtype}"
        peak = np.abs(exact).max()
        own_error = np.abs(torch32.detach().numpy() - exact).max()
        # A lucky exact float32 result must not forbid a last bit: a few ulp of the peak are free.
        allowed = factor * max(own_error, 8 * np.finfo(np.float32).eps * peak)
        error = np.abs(ours.astype(np.float64) - exact).max()
        assert error <= allowed, f"output {index}: error {error:.3e}, allowed {allowed:.3e}"
