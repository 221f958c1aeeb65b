"""Adds programs `predict`, `steer` and `advance` to a finished bundle, whoever exported it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffveil.bundle import Bundle
from diffveil.golden import GOLDEN_FILE
from diffveil.programs import ALL_PROGRAMS, LOOP_PROGRAMS, ProgramSpec
from diffveil_export.bundle_writer import ProgramFacts, copy_bundle, staged_folder
from diffveil_export.cost import program_cost
from diffveil_export.golden import golden_outputs
from diffveil_export.joining import enter_checked
from diffveil_export.lower import lower
from diffveil_export.step_parts import Advance, PredictProgram, Steer
from diffveil_export.verify import random_inputs

__all__ = ["add_loop_programs"]

_EXAMPLE_SEED = 5
_GOLDEN_SEED = 47


def add_loop_programs(bundle: Bundle, target: Path, *, force: bool = False) -> Bundle:
    """Write a copy of a bundle that holds the programs of whole loops as well; keys stay valid.

    They have no weights and take some kilobytes. Engines built from the bundle are not copied.

    Args:
        bundle: Any bundle; one that has the programs gets them replaced.
        target: Folder to create; the bundle's own with `force`.
        force: Replace a bundle that is already there.

    Raises:
        OptionError: `target` exists.
        ParityError: A program does not compute what PyTorch does; nothing is left behind.
    """
    bundle.verify(full=True)
    modules = dict(zip(LOOP_PROGRAMS, (PredictProgram(), Steer(), Advance()), strict=True))
    with staged_folder(target, force=force) as folder:
        copy_bundle(bundle, folder)
        tensors = load_file(folder / GOLDEN_FILE) if bundle.has_golden else None
        for name, module in modules.items():
            spec = ALL_PROGRAMS[name]
            if tensors is not None:
                tensors |= golden_outputs(module, spec, bundle.dimensions, tensors, _GOLDEN_SEED)
                save_file(tensors, folder / GOLDEN_FILE)
            _add(folder, spec, module.eval(), bundle)
        Bundle.load(folder).verify(full=True)
    return Bundle.load(target)


def _add(folder: Path, spec: ProgramSpec, module: nn.Module, bundle: Bundle) -> None:
    """Write one program, hold it against PyTorch, and state both."""
    d = bundle.dimensions
    inputs = random_inputs(spec, d, 2, torch.Generator().manual_seed(_EXAMPLE_SEED))
    model = lower(module, spec, inputs)
    ir.save(model, folder / f"{spec.name}.onnx")
    facts = ProgramFacts((), cost=program_cost(model))
    enter_checked(folder, spec, d, module, facts, {}, (GOLDEN_FILE,))
