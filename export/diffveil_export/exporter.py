"""The life of an export: refuse, round, lower, write, verify, rename."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import save
from torch import nn

from diffveil.bundle import CONSTANTS_FILE, Bundle
from diffveil.engines import ONNXRuntimeCPU
from diffveil.errors import OptionError
from diffveil.programs import DYNAMIC_AXES, PROGRAMS, ProgramSpec
from diffveil_export.bundle_writer import staged_folder, write_manifest
from diffveil_export.components import Components
from diffveil_export.gradient import trace_gradient
from diffveil_export.lower import lower
from diffveil_export.models.embedded import write_source
from diffveil_export.storage import (
    WEIGHT_STORAGES,
    DataFile,
    WeightStorage,
    round_weights,
    shrink_initializers,
)
from diffveil_export.verify import (
    OutputParity,
    check_program,
    random_inputs,
    require_parity,
)
from diffveil_export.wrappers import wrap

__all__ = ["MODEL_CARD_FILE", "WEIGHTS_FILE", "ExportResult", "export_bundle"]

WEIGHTS_FILE = "weights.bin"
MODEL_CARD_FILE = "MODEL_CARD.md"
_EXAMPLE_SEED = 2  # the inputs of tracing; verification draws others
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportResult:
    """What an export produced.

    Attributes:
        bundle: The bundle, at its final place.
        parity: Every comparison with PyTorch.
    """

    bundle: Bundle
    parity: tuple[OutputParity, ...]


def export_bundle(
    components: Components,
    target: str | Path,
    *,
    weights: WeightStorage = "int8",
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Export a model as a bundle, verified against PyTorch.

    Args:
        components: The model, in float32. Its weights are rounded in place to `weights`.
        target: Folder to create.
        weights: How weights are stored; arithmetic is float32 in any case.
        force: Replace a bundle that is already there.
        progress: Told, in words, what begins.

    Raises:
        OptionError: `target` exists, or an option is unknown.
        ParityError: A program does not compute what PyTorch computes; nothing is left behind.
    """
    if weights not in WEIGHT_STORAGES:
        raise OptionError(f"weights: received '{weights}', expected one of {WEIGHT_STORAGES}")
    say = progress or _log.info
    with staged_folder(Path(target), force=force) as folder:
        for module in components.modules().values():
            round_weights(module, weights)
        constants = {"unconditional": components.unconditional.contiguous()}
        (folder / CONSTANTS_FILE).write_bytes(save(constants))

        store = DataFile(folder / WEIGHTS_FILE)
        for spec in PROGRAMS.values():
            say(f"exporting {spec.name}")
            model = _lower(components, spec)
            shrink_initializers(model, weights)
            store.absorb(model)
            ir.save(model, folder / f"{spec.name}.onnx")
        write_source(folder, components, store)
        if components.card:
            (folder / MODEL_CARD_FILE).write_text(components.card, encoding="utf-8")
        store.close()

        data = {name: [WEIGHTS_FILE] for name in PROGRAMS}
        provenance = {
            "weights_stored": weights,
            "exporter": f"torch {torch.__version__}, onnx_ir {ir.__version__}",
        }
        write_manifest(folder, components, data=data, parity={}, provenance=provenance)
        say("verifying")
        parity = _verify(components, folder)
        require_parity([row for rows in parity.values() for row in rows])
        records = {name: [row.entry() for row in rows] for name, rows in parity.items()}
        write_manifest(folder, components, data=data, parity=records, provenance=provenance)
        Bundle.load(folder).verify(full=True)
    rows = tuple(row for group in parity.values() for row in group)
    return ExportResult(Bundle.load(target), rows)


def _lower(components: Components, spec: ProgramSpec) -> ir.Model:
    generator = torch.Generator().manual_seed(_EXAMPLE_SEED)
    inputs = random_inputs(spec, components.dimensions, 2, generator)
    module: nn.Module = wrap(components, spec.name)
    if spec.name == "guide":
        batch = tuple(
            tuple(i for i, axis in enumerate(t.axes) if axis in DYNAMIC_AXES) for t in spec.inputs
        )
        module = trace_gradient(module, inputs, batch)
    return lower(module, spec, inputs)


def _verify(components: Components, folder: Path) -> dict[str, tuple[OutputParity, ...]]:
    """Compare all programs with PyTorch, on the engine that most users will run."""
    bundle, backend = Bundle.load(folder), ONNXRuntimeCPU(threads=torch.get_num_threads())
    results = {}
    for name in PROGRAMS:
        engine = backend.load(bundle, name)
        results[name] = check_program(wrap(components, name), engine, components.dimensions)
        engine.close()
    return results
