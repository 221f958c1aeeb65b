"""Adds program `assess`, a judge of drawn faces, to a finished bundle, whoever exported it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffveil.bundle import Bundle
from diffveil.golden import GOLDEN_FILE
from diffveil.programs import ALL_PROGRAMS
from diffveil_export.bundle_writer import ProgramFacts, copy_bundle, staged_folder
from diffveil_export.cost import program_cost
from diffveil_export.exporter import WEIGHTS_FILE
from diffveil_export.golden import golden_outputs
from diffveil_export.joining import enter_checked, opset_of, save_with_weights
from diffveil_export.lower import INT4_OPSET, lower
from diffveil_export.storage import StoredWeights, WeightStorage, round_weights
from diffveil_export.verify import random_inputs

__all__ = ["add_judge"]

_SPEC = ALL_PROGRAMS["assess"]
_DATA = "assess.bin"
_EXAMPLE_SEED = 6
_GOLDEN_SEED = 53


def add_judge(
    bundle: Bundle,
    judge: nn.Module,
    target: Path,
    *,
    origin: str = "",
    weights: WeightStorage = "int8",
    force: bool = False,
) -> Bundle:
    """Write a copy of a bundle that holds `assess` as well; recovery keys stay valid.

    Engines that were built from the bundle are not copied.

    Args:
        bundle: Any bundle; one that has the program gets it replaced.
        judge: Images [B, 3, S, S] in [-1, 1], S the bundle's image size, to naturalness [B], 0 … 1.
            Its weights are rounded in place; those that are stored as `recognize` stores them are
            not stored again.
        target: Folder to create; the bundle's own with `force`.
        origin: What the judge was trained on; joins the bundle's provenance.
        weights: How the program's weights are stored. The embedded judge lost nothing by four bits.
        force: Replace a bundle that is already there.

    Raises:
        OptionError: `target` exists.
        ParityError: The program does not compute what PyTorch computes; nothing is left behind.
    """
    d = bundle.dimensions
    bundle.verify(full=True)
    judge = judge.eval().requires_grad_(False)
    round_weights(judge, weights)
    with staged_folder(target, force=force) as folder:
        copy_bundle(bundle, folder, without=[_DATA])
        inputs = random_inputs(_SPEC, d, 2, torch.Generator().manual_seed(_EXAMPLE_SEED))
        opset = INT4_OPSET if weights == "int4" else opset_of(bundle)
        model = lower(judge, _SPEC, inputs, opset=opset)
        cost = program_cost(model)
        shared = StoredWeights.of(folder / WEIGHTS_FILE, [bundle.program_path("recognize")])
        data = save_with_weights(model, folder / "assess.onnx", _DATA, weights, shared)
        if bundle.has_golden:
            tensors = load_file(folder / GOLDEN_FILE)
            tensors |= golden_outputs(judge, _SPEC, d, tensors, _GOLDEN_SEED)
            save_file(tensors, folder / GOLDEN_FILE)

        provenance = {"assess": origin} if origin else {}
        facts = ProgramFacts(data, cost=cost)
        enter_checked(folder, _SPEC, d, judge, facts, provenance, (_DATA, GOLDEN_FILE))
        Bundle.load(folder).verify(full=True)
    return Bundle.load(target)
