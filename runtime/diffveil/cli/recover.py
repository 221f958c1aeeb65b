"""`diffveil recover`: protected photos and their key files in, the faces back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffveil.cli.exits import ExitCode, WriteError
from diffveil.cli.paths import check_targets, find_key, find_photos, output_folder, plan_jobs
from diffveil.cli.progress import ProgressBar
from diffveil.cli.report import describe_photo, json_line, report_failure
from diffveil.cli.secret import ask_passphrase, passphrase_from_file, readable_file
from diffveil.errors import KeyFileError, KeyMismatchError, PhotoError

if TYPE_CHECKING:
    from diffveil.result import Result

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Recovers every photo; one that fails does not stop the others.

    Returns:
        0, or the exit code of the first photo that failed.

    Raises:
        UsageError: the command line cannot be meant; nothing was computed or written.
    """
    photos = find_photos(args.photos, exclude=output_folder(args.output))
    jobs = plan_jobs(photos, args.output, tag="recovered")
    keys = [find_key(args.key, photo) for photo in photos]
    check_targets(
        [(job.source, job.outputs[0]) for job in jobs],
        inputs=[*(job.source for job in jobs), *keys],
    )
    passphrase, identity = None, None
    if args.identity:
        identity = readable_file(args.identity, "--identity")
    elif args.passphrase_file:
        passphrase = passphrase_from_file(args.passphrase_file)
    else:
        passphrase = ask_passphrase(sealing=False)

    from diffveil.keys import RecoveryKey
    from diffveil.protector import Protector

    protector = Protector.load(args.bundle, backend=args.backend, max_memory=args.max_memory)
    status: int = ExitCode.DONE
    for number, (job, path) in enumerate(zip(jobs, keys, strict=True), start=1):
        label = "recover" if len(jobs) == 1 else f"recover {number} of {len(jobs)}"
        with ProgressBar(label) as bar:
            try:
                key = RecoveryKey.unseal(path, passphrase=passphrase, identity=identity)
                result = protector.recover(job.source, key, progress=bar)
                _write(result, job.outputs[0])
            except (PhotoError, KeyFileError, KeyMismatchError, WriteError) as error:
                failure = report_failure(
                    bar,
                    job.source,
                    error,
                    as_json=args.json,
                    culprit=path if isinstance(error, KeyFileError) else None,
                )
                status = status or failure
                continue
            if args.json:
                record = describe_photo(
                    job.source, job.outputs, path, result.backend, result.seconds, result.faces
                )
                bar.message(json_line(record), sys.stdout)
            else:
                count = len(result.faces)
                faces = f"{count} face{'s' if count != 1 else ''} in {result.seconds:.1f} s"
                if result.expected_loss is not None:
                    faces += (
                        f" (the key was made on {key.backend}: up to {result.expected_loss:g} dB "
                        f"worse on {result.backend})"
                    )
                bar.message(f"{job.source} -> {job.outputs[0]}: {faces}", sys.stdout)
    return status


def _write(result: Result, output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        result.save(output)
    except (PhotoError, OSError) as error:
        raise WriteError(str(error)) from error
