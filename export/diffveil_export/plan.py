"""What an export would produce, how large it would be and about how long it would take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffveil_export.blocks import BLOCK
from diffveil_export.components import Components
from diffveil_export.golden import is_large
from diffveil_export.precision import Precision
from diffveil_export.storage import WeightStorage, in_blocks
from diffveil_export.verify import random_inputs
from diffveil_export.wrappers import wrap

__all__ = ["ProgramPlan", "plan_export", "total_bytes"]

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0}
_INT4_BYTES = 0.5 + 2 / BLOCK  # and a float16 scale for each block; what is in none is int8 then

# Measured on two CPU cores with models from tiny to Stable Diffusion's size; an order of magnitude.
_LAYER_SECONDS = 0.06
_GUIDE_LAYER_SECONDS = 0.5
_FLOPS_PER_SECOND = 60e9


@dataclass(frozen=True)
class ProgramPlan:
    """One program of an export that has not been made.

    Attributes:
        program: Its name.
        parameters: Numbers in the weights of the networks that it is cut from.
        weight_bytes: Bytes of its weights as stored; programs share them in the bundle.
        flops: Operations of one call with one face, convolutions and matrix products only.
        seconds: Rough time to export and verify it on two cores.
    """

    program: str
    parameters: int
    weight_bytes: int
    flops: int
    seconds: float


def plan_export(
    components: Components, storage: WeightStorage, precision: Precision
) -> tuple[ProgramPlan, ...]:
    """Plan every program; nothing is computed, so this takes seconds at any size.

    Args:
        components: The model.
        storage: How weights would be stored in a float32 bundle.
        precision: Type of the arithmetic; 16-bit types store weights as they are.
    """
    width = _Width(components, storage, precision)
    runs = 1 if is_large(components.dimensions) else 1 + 1 + 3  # golden inputs, batches 1 and 3
    plans = []
    for spec in components.programs:
        module = wrap(components, spec.name)
        weights = _weights(module)
        parameters, stored = sum(p.numel() for p in weights), round(sum(map(width, weights)))
        layers = sum(1 for m in module.modules() if not list(m.children()))
        generator = torch.Generator().manual_seed(0)
        inputs = random_inputs(spec, components.dimensions, 1, generator)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(tensor) for tensor in inputs]
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(*fakes)
        flops = int(counter.get_total_flops())
        tracing = layers * (_GUIDE_LAYER_SECONDS if spec.name == "guide" else _LAYER_SECONDS)
        # PyTorch and the engine compute every comparison once each.
        seconds = 1 + tracing + 2 * runs * flops / _FLOPS_PER_SECOND
        plans.append(ProgramPlan(spec.name, parameters, stored, flops, seconds))
    return tuple(plans)


def total_bytes(components: Components, storage: WeightStorage, precision: Precision) -> int:
    """Bytes of all weights, each counted once however many programs share it."""
    width = _Width(components, storage, precision)
    seen = {id(p): p for m in components.modules().values() for p in _weights(m)}
    return round(sum(map(width, seen.values())))


class _Width:
    """Bytes of a tensor of the model, as stored."""

    def __init__(
        self, components: Components, storage: WeightStorage, precision: Precision
    ) -> None:
        kind = storage if precision == "float32" else precision
        self._bytes = _BYTES["int8" if kind == "int4" else kind]
        denoiser = components.modules()["unet"].named_parameters() if kind == "int4" else ()
        self._in_blocks = {id(p) for n, p in denoiser if p.ndim > 1 and in_blocks(n, p.shape)}

    def __call__(self, tensor: torch.Tensor) -> float:
        width = _INT4_BYTES if id(tensor) in self._in_blocks else self._bytes
        return tensor.numel() * width


def _weights(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
