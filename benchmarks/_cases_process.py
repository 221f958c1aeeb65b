"""Cases of whole processes: importing, the first result, memory, the command line on a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks._session import Session
from benchmarks._timing import clock, in_turns
from benchmarks.peers import NotRunError, deface_command

__all__ = ["process"]

_PHOTOS = 8
_PEAK = """
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""
_CODES = {
    "bare interpreter": "",
    "import numpy": "import numpy",
    "import diffveil": "import diffveil",
    "first result": (
        "import json, sys, diffveil\n"
        "from PIL import Image\n"
        "photo, options = sys.argv[1], json.loads(sys.argv[2])\n"
        "with diffveil.Protector.load(**options) as protector:\n"
        "    protector.anonymize(photo, make_key=False)\n"
    ),
}
"""What a fresh interpreter does, by name."""


def process(session: Session) -> None:
    """Whole processes from start to end, in turns."""
    _starts(session)
    _command_line(session)


def _starts(session: Session) -> None:
    photo = str(next(iter(sorted(session.folder_of_photos(2).iterdir()))))
    options = {"backend": "cpu", "threads": session.threads}
    if session.bundle is not None:
        options["bundle"] = str(session.bundle)
    arguments = [photo, json.dumps(options)]
    ways = {name: clock(partial(_python, code, *arguments)) for name, code in _CODES.items()}
    times = in_turns(ways, session.seconds, fewest=session.fewest)
    for name, seconds in times.items():
        excluded = "nothing: the whole process, files in the page cache"
        session.recorder.add(
            f"process/{name}", session.provider, "time", "s", seconds, excluded=excluded
        )
    ratio = times["import diffveil"] / times["import numpy"]
    session.recorder.add(
        "process/import diffveil", session.provider, "time over import numpy", "×", ratio
    )
    if sys.platform != "linux":
        return
    for name, code in _CODES.items():
        peaks = [int(_python(code + _PEAK, *arguments)) / 1024 for _ in range(session.fewest)]
        session.recorder.add(f"process/{name}", session.provider, "peak memory", "MiB", peaks)


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def _command_line(session: Session) -> None:
    """Both command lines on the same folder; each finds faces itself."""
    folder = session.folder_of_photos(2 if session.quick else _PHOTOS)

    def ours() -> float:
        out = session.fresh("cli-ours")
        command = [sys.executable, "-m", "diffveil", "anonymize", str(folder), "-o", str(out)]
        if session.bundle is not None:
            command += ["--bundle", str(session.bundle)]
        return _seconds(command)

    def deface(way: str, command: list[str]) -> float:
        # It writes beside its inputs.
        inputs = shutil.copytree(folder, session.fresh("cli-deface") / "photos")
        names = sorted(str(path) for path in Path(inputs).iterdir())
        return _seconds([*command, "--replacewith", way, *names])

    ways = {session.provider: ours}
    try:
        command = deface_command()
        ways |= {f"deface {way}": partial(deface, way, command) for way in ("blur", "mosaic")}
    except NotRunError as error:
        session.recorder.not_run("process/command line", "deface blur", str(error))
    times = in_turns(ways, session.seconds, fewest=session.fewest, warm_up=1)
    session.keep(
        "process/command line",
        times,
        base=session.provider,
        faces=len(list(folder.iterdir())),
        per="photo",
        excluded="nothing: start, model loading, JPEG files read and written",
    )


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - started
