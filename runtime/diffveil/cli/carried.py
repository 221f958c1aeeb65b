"""`diffveil recover --carry`: protected photos and a passphrase in, the faces back; no key file."""

from __future__ import annotations

import argparse
import sys

from diffveil.cli.exits import ExitCode, UsageError, WriteError
from diffveil.cli.paths import check_targets, find_photos, output_folder, plan_jobs
from diffveil.cli.progress import ProgressBar
from diffveil.cli.report import describe_photo, json_line, report_failure
from diffveil.cli.secret import ask_passphrase, passphrase_from_file
from diffveil.errors import NoFaceError, PhotoError

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Recovers every photo; one that fails does not stop the others.

    Returns:
        0, or the exit code of the first photo that failed.

    Raises:
        UsageError: the command line cannot be meant; nothing was computed or written.
    """
    if args.key or args.identity:
        raise UsageError("--carry needs no key file: leave out --key and --identity")
    photos = find_photos(args.photos, exclude=output_folder(args.output))
    jobs = plan_jobs(photos, args.output, tag="recovered")
    check_targets(
        [(job.source, job.outputs[0]) for job in jobs], inputs=[job.source for job in jobs]
    )
    if args.passphrase_file:
        passphrase = passphrase_from_file(args.passphrase_file)
    else:
        passphrase = ask_passphrase(sealing=False)

    from diffveil.protector import Protector
    from diffveil.secretkeys import secret_key

    secret = secret_key(passphrase)
    protector = Protector.load(args.bundle, backend=args.backend, max_memory=args.max_memory)
    status: int = ExitCode.DONE
    for job in jobs:
        with ProgressBar("recover") as bar:
            try:
                result = protector.recover_carried(job.source, secret, progress=bar)
                try:
                    job.outputs[0].parent.mkdir(parents=True, exist_ok=True)
                    result.save(job.outputs[0])
                except (PhotoError, OSError) as error:
                    raise WriteError(str(error)) from error
            except (PhotoError, NoFaceError, WriteError) as error:
                status = status or report_failure(bar, job.source, error, as_json=args.json)
                continue
            count = len(result.faces)
            text = f"{job.source} -> {job.outputs[0]}: {count} face{'s' if count != 1 else ''}"
            if args.json:
                record = describe_photo(
                    job.source, job.outputs, None, result.backend, result.seconds, result.faces
                )
                text = json_line(record)
            bar.message(text, sys.stdout)
    return status
