"""Take a bundle apart into the files that the training scripts go on from.

    python recipes/reference/unpack.py runtime/diffveil/bundles/reference-128 --work .work/reference

For machines that have the repository but not the checkpoints: writes `autoencoder.pt`,
`diffusion.pt`, `recognizer.pt`, `few.safetensors` and `guide-decoder` where they are missing.
Optimizer state is not in a bundle, and weights come back rounded to int8, which the first minutes
of training repair. Of the few-step change a bundle has the share that shipped: assemble it as it is
with `--few-scale 1`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from assemble import write_part
from common import save_change, save_checkpoint

from diffveil.bundle import Bundle
from diffveil_export.models.embedded import load_embedded
from diffveil_export.reference.recognizer import FaceRecognizer


def unfused(fused: FaceRecognizer) -> FaceRecognizer:
    """The recognizer with its batch normalisations back, each doing nothing but adding a bias."""
    network = FaceRecognizer(**{k: _tuple(v) for k, v in fused.config.items()})
    state, target = fused.state_dict(), network.state_dict()
    for name in target:
        if name in state:
            target[name] = state[name]
            continue
        layer, _, leaf = name.rpartition(".")
        if leaf == "bias":
            target[name] = state[layer.replace("norm", "conv") + ".bias"]
        elif leaf == "running_var":
            # BatchNorm divides by √(var + 1e-5): this makes that division by one.
            target[name] = torch.full_like(target[name], 1 - 1e-5)
        elif leaf == "running_mean":
            target[name] = torch.zeros_like(target[name])
    network.load_state_dict(target)
    return network


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".work/reference"))
    args = parser.parse_args()

    modules = load_embedded(Bundle.load(args.bundle)).modules()
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
