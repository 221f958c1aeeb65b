"""Give a bundle its surrogates: looks of nobody, mixed out of the training faces.

    python recipes/reference/make_surrogates.py BUNDLE --work .work/reference -o BUNDLE --force

Needs the faces that prepare.py gathered, and a bundle, whose own programs look at them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import load_faces, to_unit

from diffveil.bundle import Bundle
from diffveil.cli.progress import ProgressBar
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil_export.surrogates import PEOPLE, add_surrogates, look_at, mix

_BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".work/reference"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--faces", type=int, default=9000, help="faces to mix (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=2048, help="how many (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there")
    args = parser.parse_args()

    data, bundle = load_faces(args.work), Bundle.load(args.bundle)
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(len(data), min(args.faces, len(data)), replace=False))
    edge = (data.shape[1] - bundle.image_size) // 2
    inner = slice(edge, edge + bundle.image_size)

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(rows), _BATCH):
            crops = np.stack([data[row][inner, inner] for row in rows[start : start + _BATCH]])
            yield to_unit(crops).contiguous().numpy()

    done = 0
    with ProgressBar("faces") as bar, Programs(bundle, ONNXRuntimeCPU()) as programs:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            bar(done, len(rows))

        tokens, identities = look_at(programs, batches(), progress)
    surrogates = mix(tokens, identities, args.count)
    origin = f"{len(surrogates)}, each the mean of {PEOPLE} people's faces out of {len(rows)}"
    add_surrogates(bundle, surrogates, args.output, origin=origin, force=args.force)
    print(f"wrote {args.output}: {origin}")


if __name__ == "__main__":
    main()
