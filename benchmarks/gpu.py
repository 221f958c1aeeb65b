"""Every backend on one machine: first whether it computes what it should, then how fast.

    python -m benchmarks.gpu [--tiny] [--only PART …] [--minutes M] [--out FILE] [--bundle DIR]

Makes a bundle of Stable Diffusion 1.x's size with random weights (speed does not depend on them),
builds engines where a GPU is, holds every backend that can run here against golden data, and times
those that pass: each program, and anonymize, hide and recover with each preset, at batch 1, 4, 8.
Kernels are held against NumPy and timed beside PyTorch. Beside all that, in the same run, stand the
published recipe in PyTorch and a GAN of StyleGAN2-1024's size with an encoder of pSp's and e4e's,
eager and compiled. What is absent is named with the reason.

Results are appended to `--out` as they come, JSON lines of the benchmarks' one schema. Started
again, the run leaves out what the file holds for the same size, precision and device: `--minutes 9`
stops before a limit of ten, and the same command goes on. Tables and a chart are written beside
the file at the end of every run. `--dry-run` shows what would be run, and builds every network
without memory.

Timed are calls on prepared crops, from host memory to host memory; loading, photos and files are
not. Exporting the full-size bundle takes 16 GiB of host memory and minutes; it is kept in
`--bundle`. Without a GPU the figures are a CPU's, and are marked so. Needs the export extra.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._gpu_bundle import SIZES, make_bundle, random_components
from benchmarks._gpu_gan import GanAnonymizer
from benchmarks._gpu_report import absent, measured, newest, render
from benchmarks._gpu_run import GpuRun, TimeIsUp, present_gpu
from benchmarks._gpu_torch import DTYPES, Mode, gan_cases, paper_cases, torch_device
from benchmarks._results import Recorder, read
from diffveil.bundle import Bundle
from diffveil.errors import DiffveilError
from diffveil.presets import PRESETS

PARTS = ("kernels", "programs", "operations", "paper", "gan")
"""What a run consists of, in order; correctness comes before any of it."""

_PACKAGES = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings", "cuda-core", "triton")
_LABELS = {"paper": "published recipe", "gan": "StyleGAN2 and encoder"}
_MODES: tuple[Mode, ...] = ("eager", "compile")
_NO_GPU = (
    "No GPU was found: these figures are a CPU's. They show that everything runs, and say nothing "
    "about any GPU."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(given)
    args.precision = args.precision or ("float32" if args.size == "tiny" else "float16")
    args.bundle = args.bundle or Path(f"build/gpu-{args.size}-{args.precision}")
    try:
        gpu = present_gpu()
    except DiffveilError as error:
        _say(f"benchmarks.gpu: PyTorch sees a GPU, diffveil does not: {error}")
        return 2
    where = "CPU" if gpu is None else gpu.name
    subject = f"{args.size}, {args.precision}, {where}"
    if args.dry_run:
        return _dry_run(args, subject)
    note = _NO_GPU if gpu is None else f"Measured on {where}."
    _say(note)
    recorder = Recorder(
        args.out,
        {
            "command": " ".join(["python -m benchmarks.gpu", *given]),
            "subject": subject,
            "bundle": f"random, {args.size}, {args.precision}",
            "threads": torch.get_num_threads(),
        },
        hardware=None if gpu is None else {"gpu": where, "driver": gpu.driver_version},
        packages=_PACKAGES,
    )
    run = GpuRun(
        recorder,
        args.seconds,
        args.batches,
        set() if args.again else measured(args.out, subject),
        time.monotonic() + 60 * args.minutes,
        _say,
        args.presets,
    )
    ended = "everything that can run here is measured"
    try:
        _measure(args, run, gpu is not None)
    except TimeIsUp:
        ended = "the time is up: the same command goes on"
    print(render(args.out, subject, note))
    for line in absent(newest(read(args.out), subject)):
        _say(line)
    _say(ended)
    return 0


def _measure(args: argparse.Namespace, run: GpuRun, gpu: bool) -> None:
    size, tiny = SIZES[args.size], args.size == "tiny"
    if {"programs", "operations"} & set(args.only):
        if not args.bundle.exists():
            args.bundle.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=args.bundle.parent) as folder:
                parts = random_components(size)
                make_bundle(parts, args.bundle, Path(folder), args.precision, _say)
        bundle = Bundle.load(args.bundle)
        if gpu:
            run.build(bundle)
        run.measure_ceiling(args.precision, 256 if tiny else 8192)
        passed = list(run.backends(bundle, args.backends))
        if gpu and not args.backends:  # it would take hours at this size
            passed = [backend for backend in passed if backend.name != "cpu"]
            _say("beside a GPU, cpu is not timed unless --backends names it")
    else:
        bundle, passed = None, []
    if "kernels" in args.only:
        run.kernels(*((1, 16, 40) if tiny else (4, 512, 2048)))
    for backend in passed:
        assert bundle is not None
        if "programs" in args.only:
            run.programs(bundle, backend)
        if "operations" in args.only:
            run.operations(bundle, backend)
    device = torch_device()
    common: Any = (device, args.precision, _MODES, args.batches, args.compiler)
    if "paper" in args.only and _missing(run, "paper"):
        run.pytorch(_LABELS["paper"], paper_cases(random_components(size), *common), device)
    if "gan" in args.only and _missing(run, "gan"):
        run.pytorch(_LABELS["gan"], gan_cases(size, *common), device)


def _missing(run: GpuRun, part: str) -> list[tuple[str, str]]:
    """Cases of PyTorch's side that are not measured yet."""
    names = ("anonymize", "hide", "recover") if part == "paper" else ("anonymize",)
    label = _LABELS[part]
    cases = [
        (f"{name}/{label}, {batch} at once", f"{label}, PyTorch {mode}")
        for mode in _MODES
        for batch in run.batches
        for name in names
    ]
    return [case for case in cases if case not in run.done]


def _dry_run(args: argparse.Namespace, subject: str) -> int:
    """Say what would be run, and build all networks without memory for their weights."""
    size, done = SIZES[args.size], measured(args.out, subject)
    with torch.device("meta"):
        parts = random_components(size)
        network = GanAnonymizer(size.generator, size.encoder)
    counted = {name: _parameters(module) for name, module in parts.modules().items()}
    counted["GAN"] = _parameters(network)
    print(f"{subject}; {', '.join(args.only)}; batches {args.batches}; {len(done)} figures there")
    print("; ".join(f"{name} {number / 1e6:.1f} M" for name, number in counted.items()))
    print(f"bundle {args.bundle}: {'there' if args.bundle.exists() else 'would be exported first'}")
    return 0


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=list(SIZES), default="sd1")
    parser.add_argument("--tiny", action="store_const", const="tiny", dest="size", help="for a CPU")
    parser.add_argument(
        "--only", type=_parts, default=PARTS, metavar="PART,…", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing after these")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--dry-run", action="store_true", help="run nothing")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/gpu.jsonl"),
        help="file of results to append to (default: %(default)s)",
    )
    parser.add_argument(
        "--bundle", type=Path, help="made there if there is none (default: build/gpu-…)"
    )
    parser.add_argument("--precision", choices=list(DTYPES), help="default: float16; tiny: float32")
    parser.add_argument("--backends", type=lambda text: text.split(","), metavar="A,B")
    parser.add_argument(
        "--presets", type=_presets, default=tuple(PRESETS), metavar="A,B", help="default: all"
    )
    parser.add_argument(
        "--batches",
        type=lambda text: tuple(int(batch) for batch in text.split(",")),
        default=(1, 4, 8),
        help="default: 1,4,8",
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="a case (default: %(default)g)")
    parser.add_argument("--compiler", default="inductor", help="back end of torch.compile")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    return _known(text, PARTS)


def _presets(text: str) -> tuple[str, ...]:
    return _known(text, tuple(PRESETS))


def _known(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = text.split(",")
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"received {text}, expected of {', '.join(known)}")
    return tuple(name for name in known if name in names)


if __name__ == "__main__":
    raise SystemExit(main())
