"""What `diffveil add-surrogates` does once its arguments are parsed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from diffveil.bundle import SURROGATES_FILE, Bundle
from diffveil.cli.progress import ProgressBar
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.errors import OptionError
from diffveil.scenes import to_images
from diffveil_export.face_photos import aligned_faces
from diffveil_export.surrogates import add_surrogates, look_at, mix

__all__ = ["run"]

_FEWEST = 16  # faces; fewer give no choice of looks


def run(args: argparse.Namespace) -> int:
    """Make and add surrogates; returns the exit code.

    Raises:
        DiffveilError: What went wrong, for the caller to print.
    """
    if args.output.exists() and not args.force:
        # Not after all photos have been looked at.
        raise OptionError(f"'{args.output}' exists; give --force to replace it")
    bundle = Bundle.load(args.bundle)
    with ProgressBar("looking at faces") as bar, Programs(bundle, ONNXRuntimeCPU()) as programs:

        def crops() -> Iterator[NDArray[np.float32]]:
            for faces in aligned_faces(args.photos, bundle, bar, aligned=args.aligned):
                yield to_images(faces)

        tokens, identities = look_at(programs, crops())
    count = len(tokens) // 2
    if count < _FEWEST:
        raise OptionError(
            f"found {count} faces, expected at least {_FEWEST}: thousands of different people "
            "give every face a look that fits"
        )
    surrogates = mix(tokens, identities, args.count, people=args.people)
    origin = f"{len(surrogates)}, each the mean of {args.people} people's faces out of {count}"
    result = add_surrogates(bundle, surrogates, args.output, origin=origin, force=args.force)
    size = result.manifest.files[SURROGATES_FILE].bytes
    if args.json:
        record = {
            "bundle": str(result.path),
            "faces": count,
            "surrogates": len(surrogates),
            "bytes": size,
            "fingerprint": result.fingerprint,
        }
        print(json.dumps(record))
        return 0
    print(f"surrogates: {origin}, {size / 1e6:.1f} MB")
    print(f"{result.path}: surrogates added, fingerprint {result.fingerprint[:16]} as before")
    return 0
