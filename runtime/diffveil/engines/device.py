"""Which GPU is here, asked of its driver: no package is needed and no CUDA context is made."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

__all__ = ["present_target"]

# CUDA's driver interface: cuda.h, CUdevice_attribute.
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


def _load_driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def present_target(
    ordinal: int = 0, *, load_driver: Callable[[], Any] = _load_driver
) -> str | None:
    """Name the GPU's compute capability as engines name it.

    Args:
        ordinal: Number of the GPU among those that are visible to this process.
        load_driver: Opens the CUDA driver library.

    Returns:
        `sm89` for compute capability 8.9, and so on; None where there is no such GPU or no driver.
    """
    try:
        driver = load_driver()
        device, values = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
        if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
            return None
        attributes = (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR)
        for value, attribute in zip(values, attributes, strict=True):
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
                return None
    except (OSError, AttributeError):
        return None
    return f"sm{values[0].value}{values[1].value}"
