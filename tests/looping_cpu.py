"""ONNX Runtime's loops for GPUs, on the host's memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffveil.bundle import Bundle
from diffveil.engines import Engine, ONNXRuntimeCPU
from diffveil.engines.onnxrt import open_session
from diffveil.engines.onnxrt_cuda import BoundEngine

__all__ = ["LoopingCPU"]


class LoopingCPU(ONNXRuntimeCPU):
    """What a GPU gets of ONNX Runtime, on the host's memory.

    Args:
        threads: Threads of one call.
        spoilt: Programs that write NaN when they are called in a loop.
    """

    name = "looping"
    takes_loops = True

    def __init__(self, threads: int | None = None, *, spoilt: frozenset[str] = frozenset()) -> None:
        super().__init__(threads)
        self._spoilt = spoilt

    def load(self, bundle: Bundle, program: str) -> Engine:
        session, spec = open_session(
            bundle, program, self.options, ["CPUExecutionProvider"], self.name, ""
        )
        if program in self._spoilt:
            session = _Spoilt(session)
        return BoundEngine(session, spec, bundle.dimensions, ("cpu", 0))


class _Spoilt:
    """A session that computes nothing but NaN on what it is bound to."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        self._session.run_with_iobinding(binding, options)
        for value in binding.get_outputs():
            value.update_inplace(np.full(value.shape(), np.nan, np.float32))
