"""`diffveil export`: arguments, and what is printed. The export itself is replaced."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffveil.bundle import Bundle
from diffveil.errors import OptionError
from diffveil_export import cli, exporter
from diffveil_export.models import reference
from diffveil_export.verify import OutputParity


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle) -> list[dict[str, Any]]:
    """Replaces loading and exporting; what was asked for lands in the list."""
    calls: list[dict[str, Any]] = []
    row = OutputParity(
        "decode", "image", 3, 1e-6, 2e-6, 130.0, "float32", "float32", (3, 3, 8, 8), (3, 3, 8, 8)
    )

    def fake(components: Any, target: Path, **options: Any) -> exporter.ExportResult:
        calls.append({"components": components, "target": target, **options})
        return exporter.ExportResult(tiny_bundle, (row,))

    monkeypatch.setattr(exporter, "export_bundle", fake)
    monkeypatch.setattr(reference, "load_reference", lambda folder, _: "components")
    return calls


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for part in ("autoencoder", "unet", "conditioner", "recognizer"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    return tmp_path


def test_options_reach_the_exporter(
    exported: list[dict[str, Any]], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(_parse(str(source), "-o", "out", "--weights", "float16", "--force")) == 0
    (call,) = exported
    assert call["components"] == "components"
    assert (call["target"], call["weights"], call["force"]) == (Path("out"), "float16", True)
    out, err = capsys.readouterr()
    assert "decode" in out
    assert "2.0e-06" in out
    assert "loading" in err


def test_json_is_one_object_a_line(
    exported: list[dict[str, Any]], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run(_parse(str(source), "-o", "out", "--json"))
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "program": "decode",
        "output": "image",
        "batch": 3,
        "max_abs": 1e-6,
        "max_rel": 2e-6,
        "psnr": 130.0,
        "cosine": 1.0,
        "norm_ratio": 1.0,
        "dtype": "float32",
        "precision": "float32",
    }


def test_sources_that_cannot_be_meant(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is no model: expected a folder"):
        cli.run(_parse(str(tmp_path / "nothing"), "-o", "out"))
    with pytest.raises(OptionError, match="--msi: a reference-family folder"):
        cli.run(_parse(str(source), "-o", "out", "--msi", "x"))
    sd = tmp_path / "sd"
    for part in ("vae", "unet", "text_encoder"):
        (sd / part).mkdir(parents=True)
    with pytest.raises(OptionError, match="--msi and --recognizer"):
        cli.run(_parse(str(sd), "-o", "out"))


def test_declaring_arguments_imports_no_pytorch() -> None:
    code = (
        "import sys, argparse, diffveil_export.cli as c; "
        "c.add_arguments(argparse.ArgumentParser()); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
