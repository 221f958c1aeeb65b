"""Computes the golden data of a bundle: inputs, and what PyTorch makes of them in float32.

`diffveil.golden` reads what this module writes and says how it is laid out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save
from torch import nn

from diffveil.golden import GOLDEN_FILE
from diffveil.programs import DYNAMIC_AXES, Dimensions, ProgramSpec
from diffveil_export.components import Components
from diffveil_export.precision import choose_loss_scale
from diffveil_export.verify import random_tensor
from diffveil_export.wrappers import wrap

__all__ = ["Golden", "compute_golden", "golden_outputs", "is_large"]

_SEED = 41
_ROWS = 2


@dataclass(frozen=True)
class Golden:
    """Golden data and what was learned on the way.

    Attributes:
        tensors: By the names that `diffveil.golden` documents.
        loss_scale: What `guide` needs to compute in float16.
    """

    tensors: dict[str, torch.Tensor]
    loss_scale: float

    def write(self, folder: Path) -> None:
        """Write the file into a bundle's folder."""
        (folder / GOLDEN_FILE).write_bytes(
            save({name: tensor.contiguous() for name, tensor in self.tensors.items()})
        )


def is_large(dimensions: Dimensions) -> bool:
    """Whether a second photo in a batch would cost minutes and gigabytes."""
    return dimensions.image_size > 160


def compute_golden(components: Components) -> Golden:
    """Draw inputs and compute the outputs of all programs.

    Inputs are rounded to what float16 holds exactly, so that images and embeddings take half the
    space. Programs on photos get one row, others two, so that the file stays small.

    Args:
        components: The model, its weights as they are stored.
    """
    generator = torch.Generator().manual_seed(_SEED)
    d = components.dimensions
    stored: dict[str, torch.Tensor] = {}
    for tensor in (t for spec in components.programs for t in spec.inputs):
        name = f"inputs.{tensor.name}"
        if name not in stored:
            rows = 1 if tensor.name == "image" else _ROWS
            value = random_tensor(tensor, d, rows, generator)
            stored[name] = value.half() if value.is_floating_point() else value

    outputs: dict[str, torch.Tensor] = {}
    scale = 1.0
    for spec in components.programs:
        photos = any(t.name == "image" for t in (*spec.inputs, *spec.outputs))
        rows = 1 if photos or (spec.name == "guide" and is_large(d)) else _ROWS
        inputs = []
        for tensor in spec.inputs:
            value = stored[f"inputs.{tensor.name}"]
            cut = tuple(slice(rows if axis in DYNAMIC_AXES else None) for axis in tensor.axes)
            inputs.append(value[cut].float() if value.is_floating_point() else value[cut])
        module = wrap(components, spec.name)
        if spec.name == "guide":
            # The way back takes a minute at full size: the one run serves both ends.
            parts = [cast(nn.Module, part) for part in components.guide_parts]
            scale, results = choose_loss_scale(module, tuple(inputs), parts)
        else:
            with torch.no_grad():
                result = module(*inputs)
            results = result if isinstance(result, tuple) else (result,)
        for tensor, value in zip(spec.outputs, results, strict=True):
            outputs[f"outputs.{spec.name}.{tensor.name}"] = value.detach()
    return Golden({**stored, **outputs}, scale)


def golden_outputs(
    module: nn.Module,
    spec: ProgramSpec,
    dimensions: Dimensions,
    tensors: Mapping[str, torch.Tensor],
    seed: int,
) -> dict[str, torch.Tensor]:
    """What a program that joins a finished bundle adds to its golden data.

    Args:
        module: Computes the program.
        spec: The program.
        dimensions: Sizes of the bundle's fixed axes.
        tensors: The bundle's golden data.
        seed: Of the inputs that no other program has.

    Returns:
        Its outputs, and those inputs that are new.
    """
    rows = 1 if is_large(dimensions) else min(_ROWS, len(tensors["inputs.latent"]))
    generator = torch.Generator().manual_seed(seed)
    new: dict[str, torch.Tensor] = {}
    inputs = []
    for tensor in spec.inputs:
        name = f"inputs.{tensor.name}"
        if name not in tensors:
            new[name] = random_tensor(tensor, dimensions, rows, generator).half()
        cut = tuple(slice(rows if axis in DYNAMIC_AXES else None) for axis in tensor.axes)
        value = {**tensors, **new}[name][cut]
        inputs.append(value.float() if value.is_floating_point() else value)
    with torch.no_grad():
        result = module(*inputs)
    results = result if isinstance(result, tuple) else (result,)
    for output, value in zip(spec.outputs, results, strict=True):
        new[f"outputs.{spec.name}.{output.name}"] = value.contiguous()
    return new
