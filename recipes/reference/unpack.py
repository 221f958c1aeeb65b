"""Take a bundle apart into the files that the training scripts go on from.

    python recipes/reference/unpack.py runtime/diffveil/bundles/reference-128 --work .work/reference

For machines that have the repository but not the checkpoints: writes `autoencoder.pt`,
`diffusion.pt`, `recognizer.pt`, `judge.pt`, `few.safetensors`, `guide-decoder` where missing.
Optimizer state is not in a bundle, and weights come back rounded to eight bits or four, which the
first minutes of training repair. Of the few-step change a bundle has the share that shipped:
assemble it as it is with `--few-scale 1`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

sys.path.insert(0, str(Path(__file__).parent))
from assemble import write_part
from common import save_change, save_checkpoint

from diffveil.bundle import Bundle
from diffveil_export.models.embedded import load_embedded
from diffveil_export.passes.fold_weights import FoldWeights
from diffveil_export.reference.judge import FaceJudge
from diffveil_export.reference.recognizer import FaceRecognizer

State = dict[str, torch.Tensor]


def unfused(fused: FaceRecognizer) -> FaceRecognizer:
    """The recognizer with its batch normalisations back, each doing nothing but adding a bias."""
    network = FaceRecognizer(**{k: _tuple(v) for k, v in fused.config.items()})
    network.load_state_dict(with_idle_norms(fused.state_dict(), network.state_dict()))
    return network


def unpacked_judge(bundle: Bundle, recognizer: FaceRecognizer) -> State:
    """Weights of the judge that `assess` computes; it sees with a copy of a recognizer."""
    model = ir.load(bundle.program_path("assess"))
    FoldWeights()(model)
    found = {
        name.removesuffix(".f32.folded"): value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    state = {}
    for name, value in FaceJudge(recognizer).state_dict().items():
        # What normalises features is part of the heads' first layers by now.
        idle = name.startswith(("heads.mean", "heads.scale"))
        state[name] = value if idle else torch.from_numpy(np.array(found[name]))
    return state


def with_idle_norms(fused: State, target: State) -> State:
    """Weights of a network whose batch normalisations do nothing but add what was fused.

    Args:
        fused: Weights of the network with every normalisation folded into its convolution.
        target: State of the network as it is trained: names and shapes.

    Returns:
        Values for all names of `target`.

    Raises:
        KeyError: `fused` lacks a weight.
    """
    state = {}
    for name, value in target.items():
        layer, _, leaf = name.rpartition(".")
        bias = layer.replace("norm", "conv") + ".bias"
        if name in fused:
            state[name] = fused[name]
        elif "norm" not in layer:
            raise KeyError(name)
        elif leaf == "bias":
            state[name] = fused[bias]
        elif leaf == "running_var":
            # BatchNorm divides by √(var + 1e-5): this makes that division by one.
            state[name] = torch.full_like(value, 1 - 1e-5)
        else:
            idle = torch.ones_like if leaf == "weight" else torch.zeros_like
            state[name] = idle(value)
    return state


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".work/reference"))
    args = parser.parse_args(argv)

    bundle = Bundle.load(args.bundle)
    modules = load_embedded(bundle).modules()
    conditioner = modules["embedder"].get_submodule("conditioner").state_dict()
    unet = modules["unet"].get_submodule("unet").state_dict()
    recognizer = modules["recognizer"]
    assert isinstance(recognizer, FaceRecognizer)
    states = {
        "autoencoder.pt": modules["autoencoder"].state_dict(),
        "diffusion.pt": {f"conditioner.{k}": v for k, v in conditioner.items()}
        | {f"unet.{k}": v for k, v in unet.items()},
        "recognizer.pt": unfused(recognizer).state_dict(),
    }
    if "assess" in bundle.manifest.programs:
        states["judge.pt"] = unpacked_judge(bundle, recognizer)
    for name, state in states.items():
        if (args.work / name).exists():
            print(f"{name} is there already: left alone")
        else:
            save_checkpoint(args.work / name, state)
            print(f"wrote {name}")
    few = args.work / "few.safetensors"
    if "few" in modules and not few.exists():
        save_change(few, modules["few"].get_submodule("unet"))
        print(f"wrote {few.name}")
    narrow = args.work / "guide-decoder"
    if "guide_decoder" in modules and not narrow.exists():
        write_part(narrow, modules["guide_decoder"])
        print(f"wrote {narrow.name}")


if __name__ == "__main__":
    main()
