"""Errors of the kernels; the package imports nothing of diffveil, so they are its own.

KernelError                  never raised itself
├── KernelInputError         an argument has another shape or dtype, or is out of range
├── KernelRecordError        a compiled kernel or its record is missing, damaged or foreign
└── KernelUnavailableError   this machine lacks a package, a GPU or a compiled kernel
"""

from __future__ import annotations

__all__ = ["KernelError", "KernelInputError", "KernelRecordError", "KernelUnavailableError"]


class KernelError(Exception):
    """Base of every error that this package raises on purpose."""


class KernelInputError(KernelError, ValueError):
    """An argument has another shape or dtype than it must have, or is out of range."""


class KernelRecordError(KernelError):
    """A compiled kernel or its record is missing, damaged or was not written by this package."""


class KernelUnavailableError(KernelError):
    """This machine lacks a package, a GPU or a kernel compiled for its GPU."""
