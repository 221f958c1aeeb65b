"""Give a bundle the few-step change of another export of the same model.

    python recipes/reference/replace_few.py BUNDLE EXPORTED -o BUNDLE --force

After train_stranger.py, assemble.py and `diffveil export`: EXPORTED is the fresh export, BUNDLE has
what make_surrogates.py and train_judge.py put into it, which does not depend on the few-step change
and need not be made again. Takes over `denoise_few` with its weights, its golden output and the
index of the sources; recovery keys of BUNDLE stay valid. Refuses an export of another model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file

from diffveil.bundle import MANIFEST_FILE, Bundle
from diffveil.engines import ONNXRuntimeCPU
from diffveil.golden import GOLDEN_FILE, check_backend
from diffveil_export.bundle_writer import copy_bundle, digest, staged_folder, write_json
from diffveil_export.exporter import FEW_STEPS_FILE
from diffveil_export.models.embedded import SOURCE_FILE
from diffveil_export.verify import require_parity

PROGRAM = "denoise_few"


def replace_few(bundle: Bundle, exported: Bundle, target: Path, *, force: bool = False) -> Bundle:
    """Write a copy of a bundle whose few-step change is that of another export.

    Args:
        bundle: Gets the change.
        exported: Has it.
        target: Folder to create; the bundle's own with `force`.
        force: Replace a bundle that is there.

    Raises:
        SystemExit: The two are not of one model, or one of them has no such change.
        ParityError: The change does not compute what its golden output says.
    """
    for one in (bundle, exported):
        one.verify(full=True)
        if FEW_STEPS_FILE not in one.manifest.files:
            sys.exit(f"'{one.path}' has no few-step change")
    if bundle.fingerprint != exported.fingerprint:
        sys.exit(f"'{exported.path}' is an export of another model: its fingerprint differs")
    with staged_folder(target, force=force) as folder:
        copy_bundle(bundle, folder)
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        theirs = json.loads((exported.path / MANIFEST_FILE).read_text(encoding="utf-8"))
        manifest["programs"][PROGRAM] = theirs["programs"][PROGRAM]
        for name in (f"{PROGRAM}.onnx", FEW_STEPS_FILE, SOURCE_FILE):
            shutil.copyfile(exported.path / name, folder / name)
        golden, fresh = (load_file(b.path / GOLDEN_FILE) for b in (bundle, exported))
        outputs = {k: v for k, v in fresh.items() if k.startswith(f"outputs.{PROGRAM}.")}
        save_file(golden | outputs, folder / GOLDEN_FILE)
        for name in (FEW_STEPS_FILE, SOURCE_FILE, GOLDEN_FILE):
            manifest["files"][name] = digest(folder / name)
        write_json(folder, manifest)
        staged = Bundle.load(folder)
        staged.verify(full=True)
        require_parity(check_backend(staged, ONNXRuntimeCPU(), programs=[PROGRAM]))
    return Bundle.load(target)


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
