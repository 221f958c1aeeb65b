"""Fuzzes the readers of `targets`: by coverage where atheris is installed, else by mutation.

    python tests/fuzz/fuzz_keys.py [--seconds N] [--corpus FOLDER] [--without-atheris]
    python tests/fuzz/fuzz_keys.py --corpus FOLDER --merge

Starts from `tests/fuzz/corpus`; what it finds on the way goes to FOLDER (default: a new temporary
one). `--merge` adds to `tests/fuzz/corpus` what of FOLDER reaches code that it does not. Ends with
an error at the first input that breaks a target, and writes that input to `crash-…` in the working
directory.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = Path(__file__).parent
CORPUS = FOLDER / "corpus"
sys.path.insert(0, str(FOLDER))

_WORDS = (
    b"\0",
    b"\xff" * 8,
    b"-> ",
    b"--- ",
    b"scrypt",
    b"X25519",
    b'"',
    b"{",
    b"}",
    b"[",
    b"9",
    b"\n",
)


def mutations(seeds: list[bytes], rng: random.Random) -> Iterator[bytes]:
    """Endless inputs made of the seeds: flips, cuts, insertions, splices."""
    while True:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            place = rng.randrange(len(data) + 1)
            match rng.randrange(6):
                case 0 if place < len(data):
                    data[place] ^= 1 << rng.randrange(8)
                case 1 if place < len(data):
                    data[place] = rng.randrange(256)
                case 2:
                    data[place:place] = rng.choice(_WORDS)
                case 3:
                    del data[place : place + rng.choice((1, 1, 4, 64))]
                case 4:
                    other = rng.choice(seeds)
                    data[place:] = other[rng.randrange(len(other) + 1) :]
                case 5 if place < len(data):
                    data[place : place + 8] = rng.choice((0, 1, 2**31, 2**63)).to_bytes(8, "little")
        yield bytes(data)


def seeds() -> list[bytes]:
    """The corpus."""
    return [file.read_bytes() for file in sorted(CORPUS.iterdir())]


def by_mutation(seconds: float) -> int:
    """Mutate for a while; return the number of inputs."""
    from targets import run_one

    end = time.monotonic() + seconds
    for count, data in enumerate(mutations(seeds(), random.Random()), start=1):
        try:
            run_one(data)
        except BaseException:
            crash = Path(f"crash-{hashlib.sha256(data).hexdigest()[:16]}")
            crash.write_bytes(data)
            print(f"broken by {crash}", file=sys.stderr)
            raise
        if time.monotonic() >= end:
            return count
    raise AssertionError("mutations never end")


def lines_of(data: bytes) -> set[tuple[str, int, int]]:
    """Jumps between the library's lines that an input makes: file, line, line before."""
    from targets import run_one

    jumps: set[tuple[str, int, int]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if "diffveil" not in name:
            return None
        before = frame.f_lineno

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal before
            jumps.add((name, frame.f_lineno, before))
            before = frame.f_lineno
            return line

        return line

    sys.settrace(trace)
    try:
        run_one(data)
    finally:
        sys.settrace(None)
    return jumps


def merge(folder: Path) -> int:
    """Add to the corpus what reaches something new, the smallest first; return how many."""
    known: set[tuple[str, int, int]] = set()
    for data in seeds():
        known |= lines_of(data)
    added = 0
    for data in sorted((file.read_bytes() for file in folder.iterdir()), key=len):
        jumps = lines_of(data)
        if not jumps <= known:
            known |= jumps
            (CORPUS / f"found-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            added += 1
    return added


def by_coverage(seconds: int, folder: str) -> None:
    """Hand over to atheris, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["diffveil", "targets"]):
        from targets import MAX_INPUT_BYTES, run_one

    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_INPUT_BYTES}",
        "-timeout=10",
        "-rss_limit_mb=1024",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, folder, str(CORPUS)], run_one)
    atheris.Fuzz()


def main() -> None:
    """Parse the options and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", metavar="FOLDER", help="where new inputs are kept")
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--without-atheris", action="store_true")
    args = parser.parse_args()
    folder = args.corpus or tempfile.mkdtemp(prefix="fuzz-corpus-")
    Path(folder).mkdir(parents=True, exist_ok=True)
    if args.merge:
        print(f"{merge(Path(folder))} inputs added")
        return
    if not args.without_atheris:
        try:
            by_coverage(args.seconds, folder)
        except ImportError:
            print("atheris is not installed: mutating without coverage", file=sys.stderr)
    print(f"{by_mutation(args.seconds)} inputs, none broke a reader")


if __name__ == "__main__":
    main()
