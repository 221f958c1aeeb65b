"""What `diffveil distill-guide` does once its arguments are parsed."""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch

from diffveil.bundle import Bundle
from diffveil.cli.progress import ProgressBar
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.errors import OptionError
from diffveil_export.distill import Distillation, encode_faces, evaluate
from diffveil_export.face_photos import aligned_faces
from diffveil_export.latent_guide import add_latent_guide
from diffveil_export.latent_recognizer import LatentRecognizer

__all__ = ["run"]

_FEWEST = 16  # faces; fewer teach nothing


def run(args: argparse.Namespace) -> int:
    """Distil; returns the exit code.

    Raises:
        DiffveilError: What went wrong, for the caller to print.
    """
    _check(args)
    bundle = Bundle.load(args.bundle)
    report: dict[str, object] = {"bundle": str(args.output)}
    with Programs(bundle, ONNXRuntimeCPU(threads=torch.get_num_threads())) as programs:
        if args.student is not None:
            student = LatentRecognizer.load(args.student)
        else:
            student, figures, faces = _train(args, programs)
            report |= {"faces": faces, **figures}
            student.origin = (
                f"distilled on {faces} faces; held-out cosine {figures['cosine']:.3f}, "
                f"gradient {figures['gradient']:.3f}"
            )
    if args.keep is not None:
        student.save(args.keep)
    result = add_latent_guide(bundle, student, args.output, force=args.force)
    if args.json:
        print(json.dumps(report))
        return 0
    if args.student is None:
        print(
            f"on held-out faces its embeddings have cosine {report['cosine']:.3f} with the "
            f"recognizer's, its gradients {report['gradient']:.3f}"
        )
    cost, full = result.program("guide_latent").cost, result.program("guide").cost
    if cost is not None and full is not None:
        print(f"guide_latent takes 1/{full.flops / cost.flops:.0f} of guide's operations")
    print(f"{result.path}: guide_latent added, fingerprint {result.fingerprint[:16]} as before")
    return 0


def _check(args: argparse.Namespace) -> None:
    if (args.student is None) == (not args.photos):
        raise OptionError("give photos to train on, or --student with a trained recognizer")
    if args.output.exists() and not args.force:
        # Not after half an hour.
        raise OptionError(f"'{args.output}' exists; give --force to replace it")
    if not args.minutes > 0 or args.width < 8 or args.held_out < 1:
        raise OptionError("expected --minutes above 0, --width of at least 8, --held-out of 1")


def _train(
    args: argparse.Namespace, programs: Programs
) -> tuple[LatentRecognizer, dict[str, float], int]:
    d = programs.bundle.dimensions
    with ProgressBar("encoding faces") as bar:
        latents = encode_faces(
            programs, aligned_faces(args.photos, programs.bundle, bar, aligned=args.aligned)
        )
    if len(latents) < args.held_out + _FEWEST:
        raise OptionError(
            f"found {len(latents)} faces, expected at least {args.held_out + _FEWEST}: thousands "
            "of different people teach it well"
        )
    # Spread over the whole set, so that no folder is held out entirely by accident of its name.
    held = np.zeros(len(latents), dtype=np.bool_)
    held[np.linspace(0, len(latents) - 1, args.held_out).astype(int)] = True
    student = LatentRecognizer(
        d.latent_channels, d.latent_size, d.embedding_width, width=args.width
    )
    distillation = Distillation(
        programs,
        latents[~held],
        student,
        checkpoint=args.checkpoint,
        minutes=args.minutes,
    )
    with ProgressBar("training") as bar:

        def progress(share: float, figures: dict[str, float]) -> None:
            bar.label = f"step {figures['step']:.0f}, cosine {figures['cosine']:.3f}"
            bar(round(1000 * share), 1000)

        distillation.run(progress)
    return student, evaluate(programs, student, latents[held]), len(latents)
