"""The life of an export: refuse, round, lower, write, verify, rename."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
import torch
from safetensors.torch import save

from diffveil.bundle import CONSTANTS_FILE, Bundle
from diffveil.engines import ONNXRuntimeCPU
from diffveil.errors import OptionError
from diffveil.golden import check_backend
from diffveil.parity import OutputParity
from diffveil.programs import DYNAMIC_AXES, ProgramSpec
from diffveil_export.bundle_writer import ProgramFacts, staged_folder, write_manifest
from diffveil_export.components import Components
from diffveil_export.cost import program_cost
from diffveil_export.golden import compute_golden, is_large
from diffveil_export.gradient import trace_gradient
from diffveil_export.lower import BFLOAT16_OPSET, INT4_OPSET, OPSET, lower
from diffveil_export.models.embedded import write_source
from diffveil_export.passes.fold_weights import FoldWeights
from diffveil_export.passes.widen_bfloat16 import WidenBFloat16
from diffveil_export.precision import InPrecision, Precision, float_dtype
from diffveil_export.storage import (
    WEIGHT_STORAGES,
    DataFile,
    WeightStorage,
    round_weights,
    shrink_initializers,
)
from diffveil_export.verify import check_program, random_inputs, require_parity
from diffveil_export.wrappers import Guide, wrap

__all__ = [
    "MODEL_CARD_FILE",
    "WEIGHTS_FILE",
    "ExportResult",
    "choose_storage",
    "export_bundle",
]

WEIGHTS_FILE = "weights.bin"
FEW_STEPS_FILE = "denoise_few.bin"
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
    weights: WeightStorage | None = None,
    precision: Precision = "float32",
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Export a model as a bundle, verified against PyTorch.

    Args:
        components: The model, in float32. Its weights are rounded in place to `weights`.
        target: Folder to create.
        weights: How weights are stored. By default int8 for float32 arithmetic; int4 is for the
            UNet's, the others are int8 then; with 16-bit arithmetic they are stored as they are
            computed with, and nothing else is allowed.
        precision: Type of the arithmetic; see `diffveil_export.precision`.
        force: Replace a bundle that is already there.
        progress: Told, in words, what begins.

    Raises:
        OptionError: `target` exists, or an option is unknown or does not fit another.
        ParityError: A program does not compute what PyTorch computes; nothing is left behind.
    """
    storage = choose_storage(weights, precision)
    say = progress or _log.info
    with staged_folder(Path(target), force=force) as folder:
        for name, module in components.modules().items():
            round_weights(module, _storage_of(name, storage))
        constants = {"unconditional": components.unconditional.contiguous()}
        (folder / CONSTANTS_FILE).write_bytes(save(constants))

        say("computing golden outputs with PyTorch")
        golden = compute_golden(components)
        golden.write(folder)
        store = DataFile(folder / WEIGHTS_FILE)
        # What only `denoise_few` needs stays apart: keys do not depend on it, see `fingerprint`.
        apart = None if components.few is None else DataFile(folder / FEW_STEPS_FILE, store)
        facts = {}
        for spec in components.programs:
            say(f"exporting {spec.name}")
            scaled = spec.name == "guide" and precision == "float16"
            scale = golden.loss_scale if scaled else None
            model = _lower(components, spec, precision, scale, _opset(storage, precision))
            if precision != "float32":
                FoldWeights()(model)
            cost = program_cost(model)
            shrink_initializers(model, storage if precision == "float32" else "float32")
            home = apart if apart is not None and spec.name == "denoise_few" else store
            home.absorb(model)
            ir.save(model, folder / f"{spec.name}.onnx")
            data = tuple(dict.fromkeys((WEIGHTS_FILE, home.path.name)))
            facts[spec.name] = ProgramFacts(data, precision=precision, loss_scale=scale, cost=cost)
        if apart is not None:
            apart.close()
            if not apart.path.stat().st_size:  # the very weights of `denoise`
                apart.path.unlink()
                facts["denoise_few"] = replace(facts["denoise_few"], data=(WEIGHTS_FILE,))
        write_source(folder, components, store, apart)
        if components.card:
            (folder / MODEL_CARD_FILE).write_text(components.card, encoding="utf-8")
        store.close()

        provenance = {
            "weights_stored": storage if precision == "float32" else precision,
            "exporter": f"torch {torch.__version__}, onnx_ir {ir.__version__}",
        }
        write_manifest(folder, components, facts=facts, provenance=provenance)
        say("verifying")
        rows = _verify(components, Bundle.load(folder), precision)
        require_parity(rows)
        facts = {
            name: replace(fact, parity=tuple(r.entry() for r in rows if r.program == name))
            for name, fact in facts.items()
        }
        write_manifest(folder, components, facts=facts, provenance=provenance)
        Bundle.load(folder).verify(full=True)
    return ExportResult(Bundle.load(target), rows)


def _storage_of(network: str, storage: WeightStorage) -> WeightStorage:
    """How one of the networks is rounded: four bits are for the denoiser alone.

    What it predicts is off by more than rounding changes; pictures and embeddings are not.
    """
    if storage == "int4" and network not in ("unet", "few"):
        return "int8"
    return storage


def choose_storage(weights: WeightStorage | None, precision: Precision) -> WeightStorage:
    """How the networks' weights are rounded before anything is exported.

    Args:
        weights: What was asked for, or None for the default.
        precision: Type of the arithmetic.

    Raises:
        OptionError: One is unknown, or they do not fit each other.
    """
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


def _opset(storage: WeightStorage, precision: Precision) -> int:
    if precision == "bfloat16":
        return BFLOAT16_OPSET
    return INT4_OPSET if storage == "int4" else OPSET


def _lower(
    components: Components,
    spec: ProgramSpec,
    precision: Precision,
    loss_scale: float | None,
    opset: int,
) -> ir.Model:
    generator = torch.Generator().manual_seed(_EXAMPLE_SEED)
    inputs = random_inputs(spec, components.dimensions, 2, generator)
    if spec.name == "guide":
        batch = tuple(
            tuple(i for i, axis in enumerate(t.axes) if axis in DYNAMIC_AXES) for t in spec.inputs
        )
        guide = Guide(*components.guide_parts, precision, loss_scale or 1.0).eval()
        return lower(trace_gradient(guide, inputs, batch), spec, inputs, opset=opset)
    module = wrap(components, spec.name)
    if precision != "float32":
        module = InPrecision(module, precision)
    return lower(module, spec, inputs, opset=opset)


def _verify(
    components: Components, bundle: Bundle, precision: Precision
) -> tuple[OutputParity, ...]:
    """Compare all programs with PyTorch, on the engine that most users will run.

    The golden inputs come first. Small models are then tried on fresh inputs with other batches.
    """
    backend = ONNXRuntimeCPU(threads=torch.get_num_threads())
    with ExitStack() as stack:
        if precision == "bfloat16":
            folder = stack.enter_context(TemporaryDirectory(dir=bundle.path.parent))
            bundle = _widened(bundle, Path(folder))
        rows = check_backend(bundle, backend)
        if is_large(components.dimensions):
            return rows
        for spec in components.programs:
            name = spec.name
            engine = backend.load(bundle, name)
            module = wrap(components, name)
            rows += check_program(module, engine, components.dimensions, precision=precision)
            engine.close()
    return rows


def _widened(bundle: Bundle, folder: Path) -> Bundle:
    """A copy of a bfloat16 bundle that a CPU can run: it rounds after every node, in float32."""
    for file in bundle.manifest.files:
        # ONNX Runtime follows no symbolic link out of a model's folder.
        try:
            os.link(bundle.path / file, folder / file)
        except OSError:
            shutil.copyfile(bundle.path / file, folder / file)
    for name in bundle.manifest.programs:
        model = ir.load(bundle.path / f"{name}.onnx")
        WidenBFloat16()(model)
        ir.save(model, folder / f"{name}.onnx")
    return _Unchecked(folder, bundle.manifest)


class _Unchecked(Bundle):
    """The copy's programs are not the ones whose hashes the manifest states."""

    def program_path(self, name: str) -> Path:
        """Path of the program, unchecked."""
        return self.path / f"{name}.onnx"
