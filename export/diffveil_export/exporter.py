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
from diffveil_export.lower import BFLOAT16_OPSET, OPSET, lower
from diffveil_export.models.embedded import write_source
from diffveil_export.passes.fold_weights import FoldWeights
from diffveil_export.passes.widen_bfloat16 import WidenBFloat16
from diffveil_export.precision import InPrecision, Precision, choose_loss_scale, float_dtype
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


@dataclass(frozen=True)
class _Exported:
    """A program that lies in the folder, and how it computes."""

    spec: ProgramSpec
    precision: Precision
    loss_scale: float | None


def export_bundle(
    components: Components,
    target: str | Path,
    *,
    weights: WeightStorage | None = None,
    precision: Precision = "float32",
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Export a model as a bundle, verified against PyTorch.

    Args:
        components: The model, in float32. Its weights are rounded in place to `weights`.
        target: Folder to create.
        weights: How weights are stored. By default int8 for float32 arithmetic; with 16-bit
            arithmetic they are stored as they are computed with, and nothing else is allowed.
        precision: Type of the arithmetic; see `diffveil_export.precision`.
        force: Replace a bundle that is already there.
        progress: Told, in words, what begins.

    Raises:
        OptionError: `target` exists, or an option is unknown or does not fit another.
        ParityError: A program does not compute what PyTorch computes; nothing is left behind.
    """
    storage = _storage(weights, precision)
    say = progress or _log.info
    with staged_folder(Path(target), force=force) as folder:
        for module in components.modules().values():
            round_weights(module, storage)
        constants = {"unconditional": components.unconditional.contiguous()}
        (folder / CONSTANTS_FILE).write_bytes(save(constants))

        store = DataFile(folder / WEIGHTS_FILE)
        exported = []
        for spec in PROGRAMS.values():
            say(f"exporting {spec.name}")
            scale = _loss_scale(components, precision) if spec.name == "guide" else None
            model = _lower(components, spec, precision, scale)
            if precision == "float32":
                shrink_initializers(model, storage)
            else:
                FoldWeights()(model)
            store.absorb(model)
            ir.save(model, folder / f"{spec.name}.onnx")
            exported.append(_Exported(spec, precision, scale))
        write_source(folder, components, store)
        if components.card:
            (folder / MODEL_CARD_FILE).write_text(components.card, encoding="utf-8")
        store.close()

        data = {name: [WEIGHTS_FILE] for name in PROGRAMS}
        provenance = {
            "weights_stored": storage if precision == "float32" else precision,
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


def _storage(weights: WeightStorage | None, precision: Precision) -> WeightStorage:
    """How the networks' weights are rounded before anything is exported."""
    float_dtype(precision)
    if weights is not None and weights not in WEIGHT_STORAGES:
        raise OptionError(f"weights: received '{weights}', expected one of {WEIGHT_STORAGES}")
    if precision == "float32":
        return weights or "int8"
    if weights not in (None, precision):
        raise OptionError(
            f"weights: received '{weights}', but in {precision} weights are stored as they are "
            f"computed with: leave the option out, or export in float32"
        )
    # bfloat16 keeps float32's range: the program's own casts round it, and parity counts that.
    return "float16" if precision == "float16" else "float32"


def _loss_scale(components: Components, precision: Precision) -> float | None:
    """The factor that keeps float16 gradients alive; other types need none."""
    if precision != "float16":
        return None
    spec = PROGRAMS["guide"]
    generator = torch.Generator().manual_seed(_EXAMPLE_SEED)
    inputs = random_inputs(spec, components.dimensions, 1, generator)
    parts = components.modules()
    return choose_loss_scale(
        wrap(components, "guide"), inputs, [parts["autoencoder"], parts["recognizer"]]
    )


def _lower(
    components: Components, spec: ProgramSpec, precision: Precision, loss_scale: float | None
) -> ir.Model:
    generator = torch.Generator().manual_seed(_EXAMPLE_SEED)
    inputs = random_inputs(spec, components.dimensions, 2, generator)
    opset = BFLOAT16_OPSET if precision == "bfloat16" else OPSET
    if spec.name == "guide":
        batch = tuple(
            tuple(i for i, axis in enumerate(t.axes) if axis in DYNAMIC_AXES) for t in spec.inputs
        )
        guide = Guide(
            components.autoencoder, components.recognizer, precision, loss_scale or 1.0
        ).eval()
        return lower(trace_gradient(guide, inputs, batch), spec, inputs, opset=opset)
    module = wrap(components, spec.name)
    if precision != "float32":
        module = InPrecision(module, precision)
    return lower(module, spec, inputs, opset=opset)


def _verify(components: Components, folder: Path) -> dict[str, tuple[OutputParity, ...]]:
    """Compare all programs with PyTorch, on the engine that most users will run."""
    bundle, backend = Bundle.load(folder), ONNXRuntimeCPU(threads=torch.get_num_threads())
    results = {}
    for name in PROGRAMS:
        engine = backend.load(bundle, name)
        results[name] = check_program(wrap(components, name), engine, components.dimensions)
        engine.close()
    return results
