"""Device kernels of diffveil, each with a NumPy and PyTorch reference of the same signature.

Nothing of diffveil is imported here: the runtime may import kernels, late and optionally, and
never the other way round.

    jit         the kernels, in Triton, and the operations on PyTorch tensors
    reference   what each computes, for NumPy arrays and PyTorch tensors
    specs       what is compiled
    aot         compiles it, with Triton, for GPUs that need not be there
    records     compiled kernels on disk
    calls       which kernels an operation launches, with which arguments
    geometry    the tables that face kernels read
    launch      runs compiled kernels through cuda-core, without Triton and PyTorch
"""

from __future__ import annotations

__all__: list[str] = []
