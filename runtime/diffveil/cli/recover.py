"""`diffveil recover`: protected photos and their key files in, the faces back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffveil.cli.exits import ExitCode, UsageError, WriteError
from diffveil.cli.paths import check_targets, find_keys, find_photos, output_folder, plan_jobs
from diffveil.cli.progress import ProgressBar
from diffveil.cli.report import describe_photo, json_line, report_failure
from diffveil.cli.secret import opening_secret
from diffveil.errors import KeyFileError, KeyMismatchError, PhotoError, WrongSecretError

if TYPE_CHECKING:
    from diffveil.keys import RecoveryKey
    from diffveil.keysecrets import Secret
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
    if len(args.key) > 1 and len(photos) > 1:
        raise UsageError("several --key belong to one photo: name a folder of keys instead")
    keys = [[path for key in args.key for path in find_keys(key, photo)] for photo in photos]
    check_targets(
        [(job.source, job.outputs[0]) for job in jobs],
        inputs=[*(job.source for job in jobs), *(path for some in keys for path in some)],
    )
    secret = opening_secret(args)

    from diffveil.protector import Protector

    protector = Protector.load(args.bundle, backend=args.backend, max_memory=args.max_memory)
    status: int = ExitCode.DONE
    for number, (job, paths) in enumerate(zip(jobs, keys, strict=True), start=1):
        label = "recover" if len(jobs) == 1 else f"recover {number} of {len(jobs)}"
        with ProgressBar(label) as bar:
            try:
                with _opened(paths, secret, every=len(args.key) > 1) as key:
                    result = protector.recover(
                        job.source, key, reencoded=args.reencoded, progress=bar
                    )
                _write(result, job.outputs[0])
            except (PhotoError, KeyFileError, KeyMismatchError, WriteError) as error:
                failure = report_failure(
                    bar,
                    job.source,
                    error,
                    as_json=args.json,
                    culprit=paths[0]
                    if isinstance(error, KeyFileError) and len(paths) == 1
                    else None,
                )
                status = status or failure
                continue
            if args.json:
                record = describe_photo(
                    job.source, job.outputs, paths[0], result.backend, result.seconds, result.faces
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


def _opened(paths: Sequence[Path], secret: Secret, *, every: bool) -> RecoveryKey:
    """The key of all files, or of those that the secret opens: a folder holds other people's too.

    Raises:
        WrongSecretError: the secret opens none, or not `every` one.
        KeyFileError: a file is damaged.
        KeyMismatchError: the files belong to different photos.
    """
    from diffveil.keys import RecoveryKey

    opened = []
    for path in paths:
        try:
            opened.append(RecoveryKey.open_with(path, secret))
        except WrongSecretError:
            if every or (path == paths[-1] and not opened):
                raise
        except KeyFileError as error:
            if len(paths) == 1:
                raise
            raise KeyFileError(f"{path.name}: {error}") from error
    return opened[0] if len(opened) == 1 else RecoveryKey.join(opened)


def _write(result: Result, output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        result.save(output)
    except (PhotoError, OSError) as error:
        raise WriteError(str(error)) from error
