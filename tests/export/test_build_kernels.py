"""`diffveil build --kernels`: what is compiled, where it goes, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from diffveil.cli import build as command
from diffveil.cli.main import main
from diffveil.errors import OptionError
from diffveil_export.engines import kernels
from diffveil_export.engines.kernels import kernel_targets
from diffveil_kernels.errors import KernelRecordError
from diffveil_kernels.records import KernelRecord
from diffveil_kernels.specs import SPECS, TARGETS

BUNDLE = Path(__file__).parents[1] / "data" / "bundle-v1"


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one's own; Triton is not called."""
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    monkeypatch.setattr(kernels, "compile_kernels", compiled)
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    return folder


def compiled(
    folder: Path, targets: Iterable[int], *, done: Callable[[KernelRecord], None]
) -> tuple[KernelRecord, ...]:
    """As `compile_kernels` tells of its kernels, but nothing is compiled."""
    records = [
        KernelRecord(
            name=spec.name,
            entry=spec.function,
            target=target,
            arch=f"sm_{target}",
            parameters=spec.parameters,
            hidden=(),
            constants={},
            num_warps=1,
            threads=32,
            shared=0,
            source_sha256="0" * 64,
            triton="0",
            file=f"{folder.name}-{target}.cubin",
            sha256="0" * 64,
            bytes=1000,
        )
        for target in targets
        for spec in SPECS.values()
    ]
    for record in records:
        done(record)
    return tuple(records)


def test_kernels_are_compiled_for_all_targets_without_a_backend(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(bundle), "--kernels"]) == 0
    out = capsys.readouterr().out
    assert out.count("cubin") == 0
    assert f"{len(SPECS) * len(TARGETS)} kernels in {bundle / 'kernels'}" in out


def test_json_names_every_kernel(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(bundle), "--kernels", "--target", "sm89,12.0", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["kernel"], row["target"]) for row in rows} == {
        (name, target) for name in SPECS for target in ("sm89", "sm120")
    }
    assert all(row["file"].startswith("kernels-") for row in rows)


def test_a_dry_run_compiles_nothing(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "compile_kernels", None)
    assert main(["build", str(bundle), "--kernels", "--target", "80", "--dry-run"]) == 0
    assert f"{len(SPECS)} kernels planned" in capsys.readouterr().out


def test_targets_without_kernels_are_refused_unless_they_are_the_engines() -> None:
    assert kernel_targets(["present"]) == TARGETS
    assert kernel_targets(["8.9", "sm_90", "120"]) == (89, 90, 120)
    assert kernel_targets(["75", "86"], engines_too=True) == (86,)
    assert kernel_targets(["75", "present"], engines_too=True) == TARGETS
    for words in (["75"], ["89", "x"], ["present", "89"], ["8"]):
        with pytest.raises(OptionError, match="no kernels for"):
            kernel_targets(words)


def test_failures_say_what_to_do(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["build", str(bundle)]) == 2
    assert "--kernels" in capsys.readouterr().err

    def failing(*_: object, **__: object) -> None:
        raise KernelRecordError("Triton 0 compiled something else")

    monkeypatch.setattr(kernels, "compile_kernels", failing)
    assert main(["build", str(bundle), "--kernels"]) == 1
    assert "kernels: Triton 0" in capsys.readouterr().err
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["build", str(bundle), "--kernels"]) == 1
    err = capsys.readouterr().err
    assert "needs triton" in err
    assert "pip install 'diffveil[export]'" in err
