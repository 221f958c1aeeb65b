"""`diffveil anonymize` and `diffveil hide`: photos in, protected photos and sealed keys out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from diffveil.cli import identities
from diffveil.cli.exits import ExitCode, UsageError, WriteError
from diffveil.cli.paths import Job, find_photos, output_folder, plan_jobs, plan_keys
from diffveil.cli.progress import ProgressBar
from diffveil.cli.report import describe_photo, json_line, report_failure
from diffveil.cli.secret import sealing_secret
from diffveil.errors import KeyFileError, NoFaceError, PhotoError

if TYPE_CHECKING:
    from diffveil.keysecrets import Secret
    from diffveil.protector import Protector
    from diffveil.result import Result

__all__ = ["TAGS", "run"]

TAGS = {"anonymize": "anonymized", "hide": "hidden"}
_TOGETHER = 4  # photos a call: their faces share batches, their pixels share memory
_Outcome: TypeAlias = "Result | PhotoError | NoFaceError"


def run(args: argparse.Namespace) -> int:
    """Protects every photo; one that fails does not stop the others.

    Returns:
        0, or the exit code of the first photo that failed.

    Raises:
        UsageError: the command line cannot be meant; nothing was computed or written.
    """
    photos = find_photos(args.photos, exclude=output_folder(args.output))
    jobs = plan_jobs(photos, args.output, tag=TAGS[args.command], variants=args.variants)
    secret_of_people = identities.plan(args)
    keys, secret = _plan_sealing(args, jobs)

    from diffveil.protector import Protector

    protector = Protector.load(args.bundle, backend=args.backend, max_memory=args.max_memory)
    more: dict[str, Any] = {}
    if secret_of_people is not None:
        more = identities.options(args, secret_of_people, protector, [job.source for job in jobs])
    status: int = ExitCode.DONE
    for start in range(0, len(jobs), _TOGETHER):
        batch = jobs[start : start + _TOGETHER]
        label = args.command
        if len(jobs) > _TOGETHER:
            label += f" {start + 1}-{start + len(batch)} of {len(jobs)}"
        with ProgressBar(label) as bar:
            outcomes = _protect(args, protector, [job.source for job in batch], bar, more)
            for offset, (job, outcome) in enumerate(zip(batch, outcomes, strict=True)):
                try:
                    if isinstance(outcome, Exception):
                        raise outcome
                    key = _write(job, outcome, keys[start + offset], secret)
                except (PhotoError, NoFaceError, WriteError) as error:
                    failure = report_failure(bar, job.source, error, as_json=args.json)
                    status = status or failure
                else:
                    _report(args, bar, job, outcome, key)
    return status


def _plan_sealing(
    args: argparse.Namespace, jobs: Sequence[Job]
) -> tuple[Sequence[Path | None], Secret | None]:
    if args.key is None:
        carried = args.command == "anonymize" and args.carry
        if (args.sealing_file and not carried) or args.recipient:
            raise UsageError("--passphrase-file and --recipient seal a key: add --key KEYFILE")
        return [None] * len(jobs), None
    # Whatever would be refused when sealing is refused here, before anything is computed.
    return plan_keys(jobs, args.key), sealing_secret(args)


def _protect(
    args: argparse.Namespace,
    protector: Protector,
    sources: Sequence[Path],
    bar: ProgressBar,
    more: dict[str, Any],
) -> Iterator[_Outcome]:
    operation: Callable[..., list[Result]] = getattr(protector, args.command)

    def protect(some: Sequence[Path]) -> list[Result]:
        return operation(
            some,
            variants=args.variants,
            preset=args.preset,
            steps=args.steps,
            strength=args.strength,
            seed=args.seed,
            on_missing=args.on_missing,
            make_key=args.key is not None,
            progress=bar,
            **more,
        )

    try:
        yield from protect(sources)
        return
    except (PhotoError, NoFaceError) as error:
        if len(sources) == 1:
            yield error
            return
    # One of them cannot be protected. Results do not depend on the batch, so the others can be
    # made alone; the failure came before any program ran, so nothing is computed twice.
    for source in sources:
        yield from _protect(args, protector, [source], bar, more)


def _write(job: Job, result: Result, key_path: Path | None, secret: Secret | None) -> Path | None:
    from diffveil.photos import write_photo

    written = None
    try:
        # Encoded first, so that the key knows the pictures as they are written; then the key: a key
        # without its photo is useless, a photo without its key is lost.
        encoded = [result.encode(output, variant=v) for v, output in enumerate(job.outputs)]
        if key_path is not None and secret is not None and result.key is not None:
            key_path.parent.mkdir(parents=True, exist_ok=True)
            result.key.seal_with(key_path, secret, overwrite=False)
            written = key_path
        for output, content in zip(job.outputs, encoded, strict=True):
            output.parent.mkdir(parents=True, exist_ok=True)
            write_photo(content, output)
    except (PhotoError, KeyFileError, OSError) as error:
        raise WriteError(str(error)) from error
    return written


def _report(
    args: argparse.Namespace, bar: ProgressBar, job: Job, result: Result, key: Path | None
) -> None:
    if args.json:
        record = describe_photo(
            job.source, job.outputs, key, result.backend, result.seconds, result.faces
        )
        bar.message(json_line(record), sys.stdout)
        return
    outputs = ", ".join(str(output) for output in job.outputs)
    count = len(result.faces)
    if not count:
        bar.message(f"{job.source} -> {outputs}: no face found, kept as it is", sys.stdout)
        return
    faces = f"{count} face{'s' if count > 1 else ''} in {result.seconds:.1f} s"
    kept = f"recovery key in {key}" if key else "recovery key discarded (no --key was given)"
    if args.command == "anonymize" and args.carry:
        kept = "carried by the photo itself"
    bar.message(f"{job.source} -> {outputs}: {faces}; {kept}", sys.stdout)
