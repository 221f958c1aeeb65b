"""What the distribution holds and asks for: the wheel as built, and the declared dependencies."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"diffveil", "diffveil_export", "diffveil_kernels"}
MAX_PACKAGE_DATA = 40_000_000  # bytes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    assert file.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def requirements(wheel: zipfile.ZipFile) -> dict[str, set[str]]:
    """Names of the packages that each extra brings; "" is the base install."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    found: dict[str, set[str]] = {extra: set() for extra in metadata.get_all("Provides-Extra", [])}
    found[""] = set()
    for requirement in metadata.get_all("Requires-Dist", []):
        extra = re.search(r"extra == ['\"]([^'\"]+)", requirement)
        package = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert package is not None
        found[extra.group(1) if extra else ""].add(package.group())
    return found


def test_wheel_holds_the_three_packages_only(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    for package in PACKAGES:
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= set(wheel.namelist())


def test_wheel_holds_every_tracked_source_file(wheel: zipfile.ZipFile) -> None:
    sources = {
        file.relative_to(root).as_posix()
        for root in (ROOT / "runtime", ROOT / "export", ROOT / "kernels")
        for file in root.rglob("*.py")
    }
    assert sources <= set(wheel.namelist())


def test_wheel_holds_the_embedded_bundle_within_its_limit(wheel: zipfile.ZipFile) -> None:
    data = [info for info in wheel.infolist() if info.filename.startswith("diffveil/bundles/")]
    assert "diffveil/bundles/reference-128/bundle.json" in {info.filename for info in data}
    assert sum(info.file_size for info in data) <= MAX_PACKAGE_DATA


def test_wheel_holds_nothing_pickled(wheel: zipfile.ZipFile) -> None:
    suffixes = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".pyc", ".so")
    assert not [name for name in wheel.namelist() if name.endswith(suffixes)]


def test_base_install_has_no_inference_engine(requirements: dict[str, set[str]]) -> None:
    assert requirements[""] == {"numpy", "pillow", "pyrage", "safetensors"}


def test_extras_are_the_promised_ones(requirements: dict[str, set[str]]) -> None:
    promised = {"cpu", "cuda", "tensorrt", "tensorrt-rtx", "faces", "kernels", "export", "dev"}
    assert set(requirements) - {""} == promised
    assert requirements["cpu"] == {"onnxruntime"}
    assert requirements["cuda"] == {"onnxruntime-gpu"}
    # The two own the same files: nothing but these extras may bring either.
    for extra in promised - {"cpu", "cuda"}:
        assert not requirements[extra] & {"onnxruntime", "onnxruntime-gpu"}


def test_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "diffveil = diffveil.cli:main" in wheel.read(name).decode()
