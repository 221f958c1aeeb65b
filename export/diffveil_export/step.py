"""Fuses program `step` from the programs of a bundle that is there already, whoever exported it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffveil._manifest import Cost
from diffveil.bundle import Bundle
from diffveil.engines import Engine, ONNXRuntimeCPU
from diffveil.golden import GOLDEN_FILE, check_backend
from diffveil.parity import OutputParity
from diffveil.programs import (
    ALL_PROGRAMS,
    Dimensions,
    ProgramSpec,
    TensorSpec,
)
from diffveil_export.assembly import Assembly
from diffveil_export.bundle_writer import ProgramFacts, copy_bundle, enter_program, staged_folder
from diffveil_export.cost import program_cost
from diffveil_export.golden import golden_outputs, is_large
from diffveil_export.joining import opset_of
from diffveil_export.lower import lower
from diffveil_export.step_parts import Predict, Update
from diffveil_export.verify import check_program, random_inputs, require_parity

__all__ = ["Predict", "StepGraphs", "Update", "fuse_step", "guide_of"]

_SPEC = ALL_PROGRAMS["step"]
_EXAMPLE_SEED = 5
_GOLDEN_SEED = 43

_TENSORS = {t.name: t for t in (*_SPEC.inputs, *_SPEC.outputs, *ALL_PROGRAMS["guide"].outputs)}
_X0 = ALL_PROGRAMS["guide"].inputs[0]


def _part(name: str, inputs: Sequence[str], outputs: Sequence[TensorSpec]) -> ProgramSpec:
    return ProgramSpec(name, "part of step", tuple(_TENSORS[i] for i in inputs), tuple(outputs))


_PREDICT = _part("predict", ("latent", "epsilon", "coefficients"), (_X0,))
_UPDATE = _part(
    "update",
    (
        *("latent", "previous", "epsilon", "previous_epsilon", "coefficients", "noise"),
        *("gradient", "embedding", "anchor", "repel", "attract", "sibling"),
        *("release", "normalise", "background", "mask"),
    ),
    (_TENSORS["next"], _TENSORS["pushed"]),
)


class StepGraphs:
    """The graphs that a step is made of; each call of `append` makes one more step of a whole.

    Args:
        bundle: Holds the programs.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._denoise, self._guide = denoiser_of(bundle), guide_of(bundle)
        d, opset = bundle.dimensions, opset_of(bundle)
        self._folder = bundle.path

        def lowered(module: nn.Module, spec: ProgramSpec) -> bytes:
            generator = torch.Generator().manual_seed(_EXAMPLE_SEED)
            model = lower(module.eval(), spec, random_inputs(spec, d, 2, generator), opset=opset)
            self.update_flops += program_cost(model).flops
            return bytes(ir.to_proto(model).SerializeToString())

        self.update_flops = 0
        self._predict = lowered(Predict(), _PREDICT)
        self._update = lowered(Update(), _UPDATE)

    def append(self, whole: Assembly, given: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        """Add a step.

        Args:
            whole: What to add it to.
            given: The inputs of program `step`.

        Returns:
            Its outputs.
        """
        values = dict(given)
        values |= whole.add(self._denoise, self._load(self._denoise), values)
        values |= whole.add("predict", _model(self._predict), values)
        values |= whole.add(self._guide, self._load(self._guide), values)
        values |= whole.add("update", _model(self._update), values)
        return {t.name: values[t.name] for t in _SPEC.outputs}

    def _load(self, program: str) -> ir.Model:
        return ir.load(self._folder / self._bundle.program(program).file.name)


def _model(raw: bytes) -> ir.Model:
    import onnx

    return ir.from_proto(onnx.load_model_from_string(raw))


def denoiser_of(bundle: Bundle) -> str:
    """The program that a step of this bundle predicts noise with: the one for few steps."""
    return "denoise_few" if "denoise_few" in bundle.manifest.programs else "denoise"


def guide_of(bundle: Bundle) -> str:
    """The program that a step of this bundle takes its gradient from: the cheapest."""
    return "guide_latent" if "guide_latent" in bundle.manifest.programs else "guide"


def fuse_step(bundle: Bundle, target: Path, *, force: bool = False) -> Bundle:
    """Write a copy of a bundle that holds `step` as well; recovery keys stay valid.

    The program refers to the weights of its parts, so the bundle grows by a graph without weights.
    Engines that were built from the bundle are not copied.

    Args:
        bundle: Any bundle; one that has the program gets it replaced.
        target: Folder to create; the bundle's own with `force`.
        force: Replace a bundle that is already there.

    Raises:
        OptionError: The parts do not fit together, or `target` exists.
        EngineError: ONNX Runtime cannot run the parts, so there is nothing to compare with.
        ParityError: The program does not compute what its parts do; nothing is left behind.
    """
    d, denoiser, guide = bundle.dimensions, denoiser_of(bundle), guide_of(bundle)
    parts = (denoiser, guide)
    entries = [bundle.program(part) for part in parts]
    bundle.verify(full=True)
    with staged_folder(target, force=force) as folder:
        copy_bundle(bundle, folder)
        graphs, whole = StepGraphs(bundle), Assembly(d)
        outputs = graphs.append(whole, {t.name: whole.input(t) for t in _SPEC.inputs})
        model = whole.model([(t, outputs[t.name]) for t in _SPEC.outputs])
        ir.save(model, folder / "step.onnx")

        costs = [entry.cost for entry in entries if entry.cost is not None]
        facts = ProgramFacts(
            data=tuple(dict.fromkeys(name for entry in entries for name in entry.data)),
            precision=next((e.precision for e in entries if e.precision != "float32"), "float32"),
            cost=None if len(costs) < len(entries) else _sum(costs, graphs.update_flops),
            parts=parts,
        )
        provenance = {"step": f"{denoiser} and {guide} of this bundle, fused"}
        backend = ONNXRuntimeCPU(threads=torch.get_num_threads())
        engines = {part: backend.load(bundle, part) for part in parts}
        try:
            separate = _Separate(engines[denoiser], engines[guide])
            _add_golden(separate, folder, d)
            enter_program(folder, _SPEC, d, facts, provenance, (GOLDEN_FILE,))
            rows = _check(separate, Bundle.load(folder), backend, facts.precision)
        finally:
            for engine in engines.values():
                engine.close()
        require_parity(rows)
        facts = ProgramFacts(
            facts.data,
            tuple(row.entry() for row in rows),
            facts.precision,
            cost=facts.cost,
            parts=parts,
        )
        enter_program(folder, _SPEC, d, facts, provenance)
        Bundle.load(folder).verify(full=True)
    return Bundle.load(target)


class _Separate(nn.Module):
    """A step as its parts compute it: their engines, and PyTorch for what joins them."""

    def __init__(self, denoise: Engine, guide: Engine) -> None:
        super().__init__()
        self._denoise, self._guide = denoise, guide

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {t.name: x for t, x in zip(_SPEC.inputs, inputs, strict=True)}
        values |= self._run(self._denoise, values)
        values["x0"] = Predict()(*(values[t.name] for t in _PREDICT.inputs))
        values |= self._run(self._guide, values)
        following, pushed = Update()(*(values[t.name] for t in _UPDATE.inputs))
        return following, values["epsilon"], values["embedding"], pushed

    @staticmethod
    def _run(engine: Engine, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = engine.run(**{t.name: values[t.name].numpy() for t in engine.program.inputs})
        return {name: torch.from_numpy(array) for name, array in outputs.items()}


def _check(
    separate: nn.Module, bundle: Bundle, backend: ONNXRuntimeCPU, precision: str
) -> tuple[OutputParity, ...]:
    """Hold the fused program against its parts."""
    d = bundle.dimensions
    engine = backend.load(bundle, "step")
    batches = (1,) if is_large(d) else (1, 3)
    rows = check_program(separate, engine, d, precision=precision, batches=batches)
    engine.close()
    if GOLDEN_FILE in bundle.manifest.files:
        rows += check_backend(bundle, backend, programs=["step"])
    return rows


def _sum(costs: Sequence[Cost], flops: int) -> Cost:
    return Cost(
        flops=sum(c.flops for c in costs) + flops,
        weight_bytes=sum(c.weight_bytes for c in costs),
        activation_bytes=sum(c.activation_bytes for c in costs),
    )


def _add_golden(separate: nn.Module, folder: Path, dimensions: Dimensions) -> None:
    """What the parts give for golden inputs; PyTorch's weights may be gone, the parts are held
    against them by golden outputs of their own."""
    file = folder / GOLDEN_FILE
    if not file.exists():
        return
    tensors = load_file(file)
    tensors |= golden_outputs(separate, _SPEC, dimensions, tensors, _GOLDEN_SEED)
    save_file(tensors, file)
