"""An engine's execution context, for one batch size on one lane."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from diffveil.engines._foreign import foreign
from diffveil.engines._kernel_cache import KernelCache
from diffveil.engines._lanes import Lane
from diffveil.engines.records import EngineRecord
from diffveil.errors import EngineError

__all__ = ["Execution"]


class Execution:
    """An engine's execution context for one batch size on one lane.

    Args:
        trt: Module of the library.
        engine: Its deserialised engine.
        record: How the engine was built.
        shapes: Shape of every input and output at that batch size.
        lane: Stream and activation memory.
        kernels: Kernels that earlier processes compiled for the engine.

    Raises:
        EngineError: The library refuses or raises; so do all methods.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        record: EngineRecord,
        shapes: Mapping[str, tuple[int, ...]],
        lane: Lane,
        kernels: KernelCache | None = None,
    ) -> None:
        self.lane, self._record = lane, record
        with foreign(f"program '{record.program}': no execution context could be made"):
            self._context = _context(trt, engine, kernels)
            if self._context is None:
                raise EngineError(f"program '{record.program}': no execution context could be made")
            for name in record.inputs:
                if not self._context.set_input_shape(name, shapes[name]):
                    raise EngineError(f"program '{record.program}' refuses {name} {shapes[name]}")
            self._size = _scratch_bytes(engine, self._context)

    @property
    def tensors(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Dtypes of the engine's inputs and of its outputs, by name."""
        return self._record.inputs, self._record.outputs

    @property
    def scratch_bytes(self) -> int:
        """Activation memory that the engine needs at that batch size."""
        return self._size

    def scratch(self, least: int = 0) -> int:
        """Give the context the lane's activation memory; its address is what graphs hold.

        Args:
            least: Make it that large, for others that run on the lane in the same graph.
        """
        memory = self.lane.scratch(max(self._size, least))
        with self._foreign("refuses its activation memory"):
            self._context.set_device_memory(memory.address, memory.size)
        return memory.address

    def bind(self, name: str, address: int) -> None:
        """Say where a tensor lies in the calls to come."""
        with self._foreign(f"refuses the address of {name}"):
            taken = self._context.set_tensor_address(name, address)
        if not taken:
            raise EngineError(f"program '{self._record.program}' refuses the address of {name}")

    def enqueue(self) -> None:
        """Run the engine once in the stream's order."""
        self.lane.device.activate()
        with self._foreign("failed to be enqueued"):
            enqueued = self._context.execute_async_v3(self.lane.stream.handle)
        if not enqueued:
            raise EngineError(f"program '{self._record.program}' failed to be enqueued")

    @property
    def capturable(self) -> bool:
        """Whether the library says that its work may be captured; where it cannot say, it may."""
        ask = getattr(self._context, "is_stream_capturable", None)
        with self._foreign("cannot say whether it can be captured"):
            return ask is None or bool(ask(self.lane.stream.handle))

    def _foreign(self, what: str) -> AbstractContextManager[None]:
        return foreign(f"program '{self._record.program}' {what}")


def _scratch_bytes(engine: Any, context: Any) -> int:
    """Activation memory for the shapes that a context was given."""
    ask = getattr(context, "update_device_memory_size_for_shapes", None)
    needed = 0 if ask is None else int(ask())
    # A library that cannot say, or says nothing: what the largest shapes of the profile need.
    return needed if needed > 0 else int(engine.device_memory_size_v2)


def _context(trt: Any, engine: Any, kernels: KernelCache | None) -> Any:
    """An execution context that takes its activation memory from us."""
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    specialise = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if specialise is None:
        return engine.create_execution_context(strategy)
    # TensorRT-RTX would first run general kernels and compile others beside; a captured graph
    # would keep the general ones for ever.
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    config.dynamic_shapes_kernel_specialization_strategy = specialise.EAGER
    if kernels is not None:
        kernels.attach(config)
    return engine.create_execution_context(config)
