"""Gather the trained networks into one model folder that `diffveil export` reads.

    python recipes/reference/assemble.py --work .work/reference -o .work/reference/model
    diffveil export .work/reference/model --guide-decoder .work/reference/guide-decoder -o BUNDLE

Also measures the recognizer's thresholds on the held-out people.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import autoencoder_file, load_autoencoder, load_change, load_recognizer, to_unit
from train_diffusion import Diffusion

from diffveil_export.reference.recognizer import FaceRecognizer

LICENCE = "research and evaluation only: trained on faces licensed for non-commercial research"


def write_part(folder: Path, network: nn.Module) -> None:
    """Write one network as `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(network.config, indent=1) + "\n")
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / "model.safetensors")


@torch.no_grad()
def thresholds(recognizer: FaceRecognizer, heldout: Path) -> dict[str, float]:
    """Cosine thresholds by false accept rate, over all impostor pairs of the held-out people."""
    files = sorted(heldout.rglob("*.png"))
    rows = []
    for start in range(0, len(files), 64):
        images = [np.asarray(Image.open(p))[16:144, 16:144] for p in files[start : start + 64]]
        rows.append(recognizer(to_unit(np.stack(images))))
    vectors = torch.cat(rows).numpy()
    people = np.unique([p.parent.name for p in files], return_inverse=True)[1]
    impostors = (vectors @ vectors.T)[np.triu(people[:, None] != people[None, :], 1)]
    genuine = (vectors @ vectors.T)[np.triu(people[:, None] == people[None, :], 1)]
    found = {str(far): float(np.quantile(impostors, 1 - far)) for far in (0.01, 0.001)}
    for far, cosine in found.items():
        print(f"recognizer: FAR {far} at cosine {cosine:.3f}, TAR {(genuine > cosine).mean():.3f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(".work/reference"))
    parser.add_argument("-o", "--out", type=Path, default=Path(".work/reference/model"))
    parser.add_argument(
        "--few-scale",
        type=float,
        default=0.4,
        help="share of distill.py's change to the UNet that ships where train_stranger.py has not "
        "gone on from it: all of it draws crisp and mottled faces, none of it soft ones (default: "
        "%(default)s)",
    )
    args = parser.parse_args()

    decoder = autoencoder_file(args.work)
    vae = load_autoencoder(decoder)
    recognizer = load_recognizer(args.work)
    diffusion = Diffusion()
    # Whichever is newer: a finished network, or the checkpoint of training that went on from it.
    files = [p for p in args.work.glob("diffusion.*") if p.suffix in {".pt", ".ckpt"}]
    newest = max(files, key=lambda p: p.stat().st_mtime)
    state: dict[str, Any] = torch.load(newest, weights_only=True)
    diffusion.load_state_dict(state["average"] if newest.suffix == ".ckpt" else state)

    write_part(args.out / "autoencoder", vae)
    write_part(args.out / "recognizer", recognizer)
    write_part(args.out / "conditioner", diffusion.conditioner)
    diffusion.unet.save_pretrained(args.out / "unet")
    if (args.work / "stranger.safetensors").exists():
        save_file(load_change(args.work / "stranger.safetensors"), args.out / "few.safetensors")
    elif (args.work / "few.safetensors").exists():
        change = load_change(args.work / "few.safetensors", args.few_scale)
        save_file(change, args.out / "few.safetensors")
    facts = {
        "name": "reference-128",
        "licence": LICENCE,
        "thresholds": thresholds(recognizer.eval(), args.work / "heldout"),
        "provenance": {
            "recipe": "recipes/reference",
            "autoencoder": decoder.name,
            "data": "aligned faces of UTKFace and CelebA; held-out people excluded",
            "teacher": "MobileFace V2 (MIT) for the recognizer",
        },
    }
    card = Path(__file__).with_name("MODEL_CARD.md").read_text(encoding="utf-8")
    (args.out / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    (args.out / "model.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
