"""What programs that join a finished bundle have in common: their weights, and their parity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU
from diffveil.golden import GOLDEN_FILE, check_backend
from diffveil.programs import Dimensions, ProgramSpec
from diffveil_export.bundle_writer import ProgramFacts, enter_program
from diffveil_export.storage import DataFile, WeightStorage, shrink_initializers
from diffveil_export.verify import check_program, require_parity

__all__ = ["enter_checked", "save_with_weights"]


def save_with_weights(model: ir.Model, file: Path, data: str, weights: WeightStorage) -> None:
    """Write a program, and its weights into a file of its own beside it.

    Args:
        model: Changed in place.
        file: The program's.
        data: Name of the weights' file.
        weights: How they are stored; they have been rounded to it.
    """
    shrink_initializers(model, weights)
    store = DataFile(file.with_name(data))
    store.absorb(model)
    ir.save(model, file)
    store.close()


def enter_checked(
    folder: Path,
    spec: ProgramSpec,
    dimensions: Dimensions,
    module: nn.Module,
    facts: ProgramFacts,
    provenance: Mapping[str, str],
    files: Iterable[str] = (),
    *,
    golden: bool = False,
) -> None:
    """State a program that is in the folder, hold it against PyTorch, and state how far it was.

    Args:
        folder: A staged bundle with `<program>.onnx`.
        spec: The program.
        dimensions: Sizes of the bundle's fixed axes.
        module: Computes it in PyTorch.
        facts: What else to state; its parity is filled in.
        provenance: Added to what the manifest states.
        files: Other files that are new or have changed; those that do not exist are passed over.
        golden: Hold it against its golden outputs as well, where the bundle has golden data.

    Raises:
        ParityError: The program does not compute what PyTorch computes.
    """
    enter_program(folder, spec, dimensions, facts, provenance, files)
    staged, backend = Bundle.load(folder), ONNXRuntimeCPU(threads=torch.get_num_threads())
    engine = backend.load(staged, spec.name)
    try:
        rows = check_program(module, engine, dimensions)
    finally:
        engine.close()
    if golden and (folder / GOLDEN_FILE).exists():
        rows += check_backend(staged, backend, programs=[spec.name])
    require_parity(rows)
    facts = replace(facts, parity=tuple(row.entry() for row in rows))
    enter_program(folder, spec, dimensions, facts, provenance)
