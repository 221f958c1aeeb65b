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
from diffveil_export.lower import INT4_OPSET, OPSET
from diffveil_export.storage import DataFile, StoredWeights, WeightStorage, shrink_initializers
from diffveil_export.verify import check_program, require_parity

__all__ = ["enter_checked", "opset_of", "save_with_weights"]


def opset_of(bundle: Bundle) -> int:
    """ONNX operator set for what joins a bundle: its denoiser's, with which it may be fused."""
    denoiser = ir.load(bundle.program_path("denoise"))
    return INT4_OPSET if denoiser.opset_imports[""] == INT4_OPSET else OPSET


def save_with_weights(
    model: ir.Model,
    file: Path,
    data: str,
    weights: WeightStorage,
    shared: StoredWeights | None = None,
) -> tuple[str, ...]:
    """Write a program, and its weights into a file of its own beside it.

    Args:
        model: Changed in place.
        file: The program's.
        data: Name of the weights' file.
        weights: How they are stored; they have been rounded to it.
        shared: A file beside it whose weights need not be written again.

    Returns:
        Names of the files that hold its weights.
    """
    shrink_initializers(model, weights)
    store = DataFile(file.with_name(data), shared)
    names = store.absorb(model)
    ir.save(model, file)
    store.close()
    if not store.path.stat().st_size:
        store.path.unlink()
    return names


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
