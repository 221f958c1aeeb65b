"""Other tools, each in a virtual environment of its own, so that their pins do not meet ours.

    python -m benchmarks.peers [NAME …]     # makes .venv-peers/NAME; benchmarks.bench then uses it

A peer is asked over pipes and takes turns with what it is compared with; the time that counts is
what it measures itself around the work, without loading and without the pipes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["PEERS", "NotRunError", "Peer", "PeerProcess", "deface_command", "set_up"]

_HERE = Path(__file__).parent
_ENVIRONMENTS = _HERE.parent / ".venv-peers"
_LAST_WORDS = 400


class NotRunError(Exception):
    """A peer cannot be run here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """What another tool needs.

    Attributes:
        requirements: What pip installs.
        script: File in this folder that runs in its environment and answers questions.
        without_dependencies: Requirements installed for themselves, their dependencies left out.
    """

    requirements: tuple[str, ...]
    script: str
    without_dependencies: tuple[str, ...] = ()


PEERS: Mapping[str, Peer] = {
    # deface asks for OpenCV with windows, which servers lack the libraries for.
    "deface": Peer(
        (
            "opencv-python-headless",
            "imageio",
            "imageio-ffmpeg",
            "scikit-image",
            "onnx",
            "onnxruntime",
            "tqdm",
        ),
        "peer_deface.py",
        ("deface==1.5.0",),
    ),
    "optimum": Peer(
        ("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0", "diffusers"), "peer_optimum.py"
    ),
}
"""By name."""


def set_up(name: str) -> None:
    """Make a peer's environment.

    Raises:
        NotRunError: pip could not install it; the message holds pip's last words.
    """
    peer, folder = PEERS[name], _ENVIRONMENTS / name
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(_python(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    asked = [peer.requirements]
    if peer.without_dependencies:
        asked.append(("--no-deps", *peer.without_dependencies))
    for arguments in asked:
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotRunError(f"pip could not install it: {done.stderr.strip()[-_LAST_WORDS:]}")
    (folder / "complete").touch()


class PeerProcess:
    """A peer that runs and answers; close it, or use it in a `with` block.

    Args:
        name: One of `PEERS`.

    Raises:
        NotRunError: It has no environment.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [str(_environment(name)), str(_HERE / PEERS[name].script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """Send a question and wait for the answer.

        Raises:
            NotRunError: It failed, or ended.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer: Any = json.loads(process.stdout.readline())
        except (OSError, ValueError) as error:
            raise NotRunError(f"{self.name} ended without an answer") from error
        if not isinstance(answer, dict) or "error" in answer:
            raise NotRunError(f"{self.name} failed: {str(answer)[-_LAST_WORDS:]}")
        return answer

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def deface_command() -> list[str]:
    """How to start deface's command line.

    Raises:
        NotRunError: It has no environment.
    """
    return [str(_environment("deface")), "-m", "deface.deface"]


def _environment(name: str) -> Path:
    """The Python of a peer's environment."""
    folder = _ENVIRONMENTS / name
    if not (folder / "complete").exists():
        raise NotRunError(f"not installed: python -m benchmarks.peers {name}")
    return _python(folder)


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def main(arguments: list[str] | None = None) -> int:
    """Make environments; returns 1 if one of them could not be made."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", choices=[*PEERS, []], metavar="NAME")
    failed = False
    for name in parser.parse_args(arguments).names or PEERS:
        if (_ENVIRONMENTS / name / "complete").exists():
            continue
        print(f"setting up {name}", file=sys.stderr, flush=True)
        try:
            set_up(name)
        except NotRunError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
