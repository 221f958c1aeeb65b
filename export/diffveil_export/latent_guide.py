"""Adds program `guide_latent` to a bundle that is there already, whoever exported it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from diffveil.bundle import MANIFEST_FILE, Bundle
from diffveil.errors import OptionError
from diffveil.golden import GOLDEN_FILE
from diffveil.programs import ALL_PROGRAMS, DYNAMIC_AXES
from diffveil_export.bundle_writer import (
    ProgramFacts,
    copy_bundle,
    staged_folder,
    write_json,
)
from diffveil_export.cost import program_cost
from diffveil_export.gradient import trace_gradient
from diffveil_export.joining import enter_checked, opset_of, save_with_weights
from diffveil_export.latent_recognizer import LatentRecognizer
from diffveil_export.lower import lower
from diffveil_export.storage import WeightStorage, round_weights
from diffveil_export.verify import random_inputs
from diffveil_export.wrappers import Guide

__all__ = ["add_latent_guide", "latent_guide"]

_SPEC = ALL_PROGRAMS["guide_latent"]
_DATA = "guide_latent.bin"
_EXAMPLE_SEED = 3


class _AsIs(nn.Module):
    """Stands where `guide` has its decoder: this recognizer reads latents."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent


def latent_guide(student: LatentRecognizer) -> Guide:
    """The program as autograd computes it; the student is fused and frozen in place."""
    return Guide(_AsIs(), student.fuse().requires_grad_(False)).eval()


def add_latent_guide(
    bundle: Bundle,
    student: LatentRecognizer,
    target: Path,
    *,
    weights: WeightStorage = "int8",
    force: bool = False,
) -> Bundle:
    """Write a copy of a bundle that holds `guide_latent` as well; recovery keys stay valid.

    The program computes in float32, whatever the others do: it is small. Engines that were built
    from the bundle are not copied, nor is a fused `step`, which holds the guide of before.

    Args:
        bundle: Any bundle; one that has the program gets it replaced.
        student: Distilled from this bundle's recognizer. Rounded and fused in place; its `origin`
            joins the bundle's provenance.
        target: Folder to create; the bundle's own with `force`.
        weights: How the program's weights are stored.
        force: Replace a bundle that is already there.

    Raises:
        OptionError: The student does not fit the bundle, or `target` exists.
        ParityError: The program does not compute what PyTorch computes; nothing is left behind.
    """
    d = bundle.dimensions
    wanted = {"channels": d.latent_channels, "size": d.latent_size, "embedding": d.embedding_width}
    given = {name: student.config[name] for name in wanted}
    if given != wanted:
        raise OptionError(f"the latent recognizer is for {given}, the bundle has {wanted}")
    bundle.verify(full=True)
    guide = latent_guide(student)
    if weights == "int4":
        raise OptionError("weights: received 'int4', in which no latent guide was ever tried")
    round_weights(guide, weights)
    with staged_folder(target, force=force) as folder:
        copy_bundle(bundle, folder, without=[_DATA])
        _drop_step(folder)

        inputs = random_inputs(_SPEC, d, 2, torch.Generator().manual_seed(_EXAMPLE_SEED))
        dynamic = tuple(
            tuple(i for i, axis in enumerate(t.axes) if axis in DYNAMIC_AXES) for t in _SPEC.inputs
        )
        traced = trace_gradient(guide, inputs, dynamic)
        model = lower(traced, _SPEC, inputs, opset=opset_of(bundle))
        cost = program_cost(model)
        data = save_with_weights(model, folder / "guide_latent.onnx", _DATA, weights)
        _add_golden(guide, folder)

        provenance = {"guide_latent": student.origin} if student.origin else {}
        facts, changed = ProgramFacts(data, cost=cost), (_DATA, GOLDEN_FILE)
        enter_checked(folder, _SPEC, d, guide, facts, provenance, changed, golden=True)
        Bundle.load(folder).verify(full=True)
    return Bundle.load(target)


def _drop_step(folder: Path) -> None:
    """A fused `step` holds the guide that was there before: it is to be fused again."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    step = manifest["programs"].pop("step", None)
    if step is None:
        return
    (folder / step["file"]).unlink()
    manifest["provenance"].pop("step", None)
    write_json(folder, manifest)


def _add_golden(guide: Guide, folder: Path) -> None:
    """What the program gives for the inputs that `guide` has golden outputs of."""
    file = folder / GOLDEN_FILE
    if not file.exists():
        return
    tensors = load_file(file)
    rows = len(tensors["outputs.guide.gradient"])
    inputs = []
    for tensor in _SPEC.inputs:
        cut = tuple(slice(rows if axis in DYNAMIC_AXES else None) for axis in tensor.axes)
        array = tensors[f"inputs.{tensor.name}"][cut].astype(np.float32)
        inputs.append(torch.from_numpy(array))
    for tensor, value in zip(_SPEC.outputs, guide(*inputs), strict=True):
        tensors[f"outputs.guide_latent.{tensor.name}"] = value.detach().numpy().copy()
    save_file(tensors, file)
