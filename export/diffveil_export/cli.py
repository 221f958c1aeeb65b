"""`diffveil export SOURCE -o BUNDLE`. PyTorch is imported when an export runs, not before."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from diffveil.errors import OptionError

if TYPE_CHECKING:
    from diffveil_export.components import Components
    from diffveil_export.exporter import ExportResult

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `diffveil export`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a model: folder of the reference family; or Stable Diffusion 1.x as a diffusers "
        "folder, as owner/name on the Hugging Face hub (a cached copy needs no network), or as one "
        ".safetensors or .ckpt file in the original layout",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--weights",
        choices=("int4", "int8", "float16", "float32"),
        help="how weights are stored when arithmetic is float32 (default: int8); int4 is for the "
        "large weights of the UNet, the others are int8 then; with 16-bit arithmetic they are "
        "stored as they are computed with",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="type of the arithmetic: float16 for GPUs, with float32 where it would overflow and a "
        "loss scale in guide; bfloat16 needs a GPU to run (default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be exported, how large and in about how long; write nothing",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument("--json", action="store_true", help="print the parity table as JSON lines")
    sd = parser.add_argument_group("Stable Diffusion sources")
    sd.add_argument(
        "--msi",
        type=Path,
        metavar="FILE",
        help="MSI weights: safetensors, or the research release's embeddings.pt, which is read "
        "without running anything in it",
    )
    sd.add_argument(
        "--recognizer",
        type=Path,
        action="append",
        metavar="FILE",
        help="weights of IR-SE50, iresnet, InceptionResnetV1 or MobileFaceNet, or any ONNX file; "
        "give it again for an ensemble, which transfers better to recognizers it has not seen",
    )
    sd.add_argument(
        "--recognizer-input",
        choices=("auto", "rgb-unit", "rgb-255", "bgr-unit", "bgr-255"),
        default="auto",
        help="channel order and range that the recognizers expect (default: what their family was "
        "trained with, or what an ONNX graph's first operators tell)",
    )
    sd.add_argument(
        "--vision",
        type=Path,
        metavar="DIR",
        help="CLIP vision tower (default: SOURCE/image_encoder; a single file has none)",
    )
    sd.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="fuse an adapter into the weights; may be repeated",
    )
    sd.add_argument(
        "--few-lora",
        metavar="FILE[:SCALE]",
        help="a UNet adapter for few steps, such as LCM-LoRA, TCD-LoRA or Hyper-SD: adds the "
        "program denoise_few for fast presets, and leaves denoise to recovery as it is",
    )
    sd.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder with vocab.json (default: SOURCE/tokenizer, or CLIP's for a single file)",
    )
    sd.add_argument(
        "--guide-decoder",
        type=Path,
        metavar="DIR",
        help="diffusers AutoencoderTiny (TAESD; for a reference-family folder what its recipe "
        "trains) that guide goes through instead of the full "
        "decoder: a much cheaper gradient; measure what it does to protection",
    )
    sd.add_argument(
        "--parser",
        type=Path,
        metavar="FILE",
        help="BiSeNet face parsing weights (19 classes): adds the program parse, so that hair and "
        "hands in front of a face stay the photo's",
    )
    sd.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    sd.add_argument(
        "--msi-input",
        choices=("rgb", "release-uint8"),
        default="rgb",
        help="what the MSI weights were trained on (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Export; returns the exit code.

    Raises:
        DiffveilError: What went wrong, for the caller to print.
    """
    from diffveil_export.exporter import export_bundle

    begun = time.monotonic()

    def progress(text: str) -> None:
        print(f"{time.monotonic() - begun:6.1f} s  {text}", file=sys.stderr)

    progress(f"loading {args.source}")
    components = _load(args)
    if args.dry_run:
        _print_plan(components, args)
        return 0
    result = export_bundle(
        components,
        args.output,
        weights=args.weights,
        precision=args.precision,
        force=args.force,
        progress=progress,
    )
    _report(result, as_json=args.json)
    return 0


def _load(args: argparse.Namespace) -> Components:
    from diffveil_export.models.reference import is_reference_folder, load_reference
    from diffveil_export.models.stable_diffusion import (
        is_stable_diffusion_folder,
        load_stable_diffusion,
    )
    from diffveil_export.sources.hub import is_hub_id
    from diffveil_export.sources.lora import parse_lora
    from diffveil_export.sources.single_file import is_single_file

    if is_reference_folder(Path(args.source)):
        given = (
            "msi",
            "recognizer",
            "vision",
            "lora",
            "few_lora",
            "tokenizer",
            "revision",
            "parser",
        )
        unused = [f"--{option.replace('_', '-')}" for option in given if getattr(args, option)]
        if unused:
            raise OptionError(f"{', '.join(unused)}: a reference-family folder brings its own")
        return load_reference(Path(args.source), args.guide_decoder)
    path = Path(args.source)
    if not (is_stable_diffusion_folder(path) or is_single_file(path) or is_hub_id(args.source)):
        raise OptionError(
            f"'{args.source}' is no model: expected a folder with autoencoder/, unet/, conditioner/"
            " and recognizer/, one with vae/, unet/ and text_encoder/, a .safetensors or .ckpt "
            "file, or owner/name on the Hugging Face hub"
        )
    missing = [f"--{o}" for o in ("msi", "recognizer") if getattr(args, o) is None]
    if missing:
        raise OptionError(f"a Stable Diffusion source needs {' and '.join(missing)} as well")
    return load_stable_diffusion(
        args.source,
        msi=args.msi,
        recognizer=args.recognizer,
        vision=args.vision,
        msi_input=args.msi_input,
        recognizer_input=args.recognizer_input,
        lora=[parse_lora(text) for text in args.lora],
        few_lora=None if args.few_lora is None else parse_lora(args.few_lora),
        tokenizer=args.tokenizer,
        revision=args.revision,
        guide_decoder=args.guide_decoder,
        parser=args.parser,
    )


def _print_plan(components: Components, args: argparse.Namespace) -> None:
    from diffveil_export.exporter import choose_storage
    from diffveil_export.plan import plan_export, total_bytes

    storage = choose_storage(args.weights, args.precision)
    plans = plan_export(components, storage, args.precision)
    stored = storage if args.precision == "float32" else args.precision
    if args.json:
        for plan in plans:
            print(json.dumps({**asdict(plan), "precision": args.precision, "stored": stored}))
        return
    print(f"{'program':<13}{'parameters':>12}{'weights MB':>12}{'GFLOP':>10}{'seconds':>9}")
    for plan in plans:
        print(
            f"{plan.program:<13}{plan.parameters:>12,}{plan.weight_bytes / 1e6:>12.1f}"
            f"{plan.flops / 1e9:>10.2f}{plan.seconds:>9.0f}"
        )
    size = total_bytes(components, storage, args.precision)
    print(
        f"{args.output} would hold about {size / 1e6:.1f} MB ({stored} weights, shared by the "
        f"programs; {args.precision} arithmetic) after about {sum(p.seconds for p in plans):.0f} s "
        "on two cores"
    )


def _report(result: ExportResult, *, as_json: bool) -> None:
    if as_json:
        for row in result.parity:
            record = {
                "program": row.program,
                "output": row.output,
                "batch": row.batch,
                "max_abs": row.max_abs,
                "max_rel": row.max_rel,
                "psnr": row.psnr,
                "cosine": row.cosine,
                "norm_ratio": row.norm_ratio,
                "dtype": row.actual_dtype,
                "precision": row.precision,
            }
            print(json.dumps(record))
        return
    print(
        f"{'program':<13}{'output':<14}{'batch':>5}{'max rel':>12}{'PSNR dB':>10}"
        f"{'cosine':>10}{'norm':>8}"
    )
    for row in result.parity:
        psnr = "exact" if row.psnr is None else f"{row.psnr:.1f}"
        print(
            f"{row.program:<13}{row.output:<14}{row.batch:>5}{row.max_rel:>12.1e}{psnr:>10}"
            f"{row.cosine:>10.6f}{row.norm_ratio:>8.4f}"
        )
    size = sum(entry.bytes for entry in result.bundle.manifest.all_files())
    print(
        f"{result.bundle.path}: {size / 1e6:.1f} MB, fingerprint {result.bundle.fingerprint[:16]}"
    )
