"""What a recovered face loses when another arithmetic opens the key than made it.

    python -m benchmarks.recovery PHOTO... [--bundle DIR] [--other NAME=DIR] [--preset fast]

Keys of all faces of the photos are made and opened by the CPU's float32 on one side and each other
arithmetic on the other, both ways: graphs that are not optimised, and programs whose interfaces are
rounded to TF32 or float16. `--other` names bundles of the same weights in another precision
(`diffveil export --precision float16`); nothing but their arithmetic differs, so keys fit them
here, though the library would refuse them. Prints a table, PSNR in dB.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks._arithmetics import Rounded, Unoptimised, to_float16, to_tf32
from diffveil.bundle import Bundle
from diffveil.detectors import CenterFace
from diffveil.engines import Backend, ONNXRuntimeCPU, Programs
from diffveil.operations import FaceOperations
from diffveil.plans import Inversion
from diffveil.presets import preset
from diffveil.scenes import read_scenes, to_images

__all__ = ["across", "main"]

_F32 = NDArray[np.float32]


def across(
    crops: _F32, maker: FaceOperations, opener: FaceOperations, inversion: Inversion
) -> tuple[float, float]:
    """What opening a key elsewhere costs, over faces [N, 3, S, S].

    Returns:
        The most that PSNR against the photo falls, in dB; and the least PSNR between what is
        recovered here and there.
    """
    key = maker.invert(crops, inversion)
    own, other = (operations.recover(*key, inversion) for operations in (maker, opener))
    loss = _psnr(own, crops) - _psnr(other, crops)
    return float(loss.max()), float(_psnr(other, own).min())


def _psnr(one: _F32, other: _F32) -> NDArray[np.float64]:
    error = np.mean(np.square(one - other, dtype=np.float64), axis=(1, 2, 3))
    decibels: NDArray[np.float64] = -10 * np.log10(np.maximum(error, 1e-30) / 4)
    return decibels


def _crops(bundle: Bundle, photos: Sequence[Path]) -> _F32:
    detector = CenterFace.load()
    scenes = read_scenes(
        list(photos),
        None,
        detect=detector.detect,
        aligned=False,
        on_missing="error",
        template=bundle.template,
        size=bundle.image_size,
    )
    return to_images(np.concatenate([scene.crops for scene in scenes]))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--bundle", type=Path, help="default: the embedded one")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--preset", default="fast")
    args = parser.parse_args(arguments)
    bundle, inversion = Bundle.load(args.bundle), preset(args.preset).recovery
    ways: dict[str, tuple[Bundle, Backend]] = {
        "unoptimised graph": (bundle, Unoptimised(1)),
        "interfaces rounded to TF32": (bundle, Rounded(to_tf32)),
        "interfaces rounded to float16": (bundle, Rounded(to_float16)),
    }
    for other in args.other:
        name, _, folder = other.partition("=")
        ways[name] = (Bundle.load(folder), ONNXRuntimeCPU())
    crops = _crops(bundle, args.photos)
    print(f"{len(crops)} faces, {bundle.name}, {inversion.sampler} in {inversion.steps} steps\n")
    print("| the other | made here, opened there | made there, opened here | faces differ by |")
    print("|---|---|---|---|")
    with Programs(bundle, ONNXRuntimeCPU()) as plain:
        here = FaceOperations(plain)
        for name, (elsewhere, backend) in ways.items():
            with Programs(elsewhere, backend) as programs:
                there = FaceOperations(programs)
                out, back = (
                    across(crops, *pair, inversion) for pair in ((here, there), (there, here))
                )
            print(
                f"| {name} | {out[0]:.3f} dB | {back[0]:.3f} dB | {min(out[1], back[1]):.0f} dB |"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
