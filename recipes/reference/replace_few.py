"""Give a bundle the few-step change of another export of the same model.

    python recipes/reference/replace_few.py BUNDLE EXPORTED -o BUNDLE --force

After train_stranger.py, assemble.py and `diffveil export`: EXPORTED is the fresh export, BUNDLE has
what distill-guide, make_surrogates.py and train_judge.py put into it, which does not depend on the
few-step change and need not be made again. Takes over `denoise_few` with its weights, its golden
output and the index of the sources; recovery keys of BUNDLE stay valid. Refuses an export whose
other weights differ.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file

from diffveil.bundle import MANIFEST_FILE, Bundle
from diffveil.golden import GOLDEN_FILE
from diffveil_export.bundle_writer import copy_bundle, digest, staged_folder, write_json
from diffveil_export.models.embedded import SOURCE_FILE

PROGRAM = "denoise_few"
SHARED, OWN = "weights.bin", "denoise_few.bin"


def replace_few(bundle: Bundle, exported: Bundle, target: Path, *, force: bool = False) -> Bundle:
    """Write a copy of a bundle whose few-step change is that of another export.

    Args:
        bundle: Gets the change.
        exported: Has it.
        target: Folder to create; the bundle's own with `force`.
        force: Replace a bundle that is there.

    Raises:
        SystemExit: The bundles do not share the weights of everything else.
    """
    for one in (bundle, exported):
        one.verify(full=True)
    if bundle.manifest.files[SHARED] != exported.manifest.files[SHARED]:
        sys.exit(f"'{exported.path}' is an export of another model: {SHARED} differs")
    with staged_folder(target, force=force) as folder:
        copy_bundle(bundle, folder)
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        theirs = json.loads((exported.path / MANIFEST_FILE).read_text(encoding="utf-8"))
        manifest["programs"][PROGRAM] = theirs["programs"][PROGRAM]
        for name in (f"{PROGRAM}.onnx", OWN, SOURCE_FILE):
            shutil.copyfile(exported.path / name, folder / name)
        golden, fresh = (load_file(b.path / GOLDEN_FILE) for b in (bundle, exported))
        save_file(
            golden | {k: v for k, v in fresh.items() if k.startswith(f"outputs.{PROGRAM}.")},
            folder / GOLDEN_FILE,
        )
        for name in (OWN, SOURCE_FILE, GOLDEN_FILE):
            manifest["files"][name] = digest(folder / name)
        write_json(folder, manifest)
        Bundle.load(folder).verify(full=True)
    replaced = Bundle.load(target)
    assert replaced.fingerprint == bundle.fingerprint
    return replaced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("exported", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="bundle to write")
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there")
    args = parser.parse_args()
    bundles = Bundle.load(args.bundle), Bundle.load(args.exported)
    replaced = replace_few(*bundles, args.output, force=args.force)
    print(f"wrote {replaced.path}, fingerprint {replaced.fingerprint[:8]}")


if __name__ == "__main__":
    main()
