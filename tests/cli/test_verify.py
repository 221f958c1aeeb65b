"""`diffveil verify`: the table, the JSON, and the exit codes that scripts rely on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffveil.bundle import MANIFEST_FILE
from diffveil.cli.main import main
from diffveil.golden import GOLDEN_FILE


def test_table_and_json(tiny_bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_bundle_path)]) == 0
    table = capsys.readouterr().out
    assert "guide     gradient" in table
    assert "DIFFERS" not in table
    words = ["verify", str(tiny_bundle_path), "--backend", "cpu", "--programs", "guide,encode"]
    assert main([*words, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["program"] for row in rows] == ["guide"] * 3 + ["encode"]
    assert all(row["ok"] and row["backend"] == "cpu" for row in rows)


@pytest.fixture
def copy(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle_path, tmp_path / "copy"))


def test_a_difference_is_status_5(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(copy / GOLDEN_FILE)
    tensors["outputs.recognize.embedding"] = np.roll(tensors["outputs.recognize.embedding"], 1, 1)
    save_file(tensors, copy / GOLDEN_FILE)
    from diffveil_export.bundle_writer import digest

    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    manifest["files"][GOLDEN_FILE] = digest(copy / GOLDEN_FILE)
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert main(["verify", str(copy)]) == 5
    out, err = capsys.readouterr()
    assert out.count("DIFFERS") == 1
    assert "do not use it" in err
    assert main(["verify", str(copy), "--programs", "encode"]) == 0
    assert main(["doctor", "--bundle", str(copy), "--verify"]) == 0
    assert "[no] results of cpu" in capsys.readouterr().out


def test_a_flipped_byte_is_status_5(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = bytearray((copy / "weights.bin").read_bytes())
    raw[1000] ^= 4
    (copy / "weights.bin").write_bytes(raw)
    assert main(["verify", str(copy)]) == 5
    assert "'weights.bin'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--backend", "abacus"], 2, "received 'abacus', expected one of"),
        (["--programs", "blur"], 5, "no program 'blur'"),
    ],
)
def test_misuse(
    words: list[str],
    code: int,
    message: str,
    tiny_bundle_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["verify", str(tiny_bundle_path), *words]) == code
    assert message in capsys.readouterr().err


def test_healthy_backends_are_reported(
    tiny_bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--bundle", str(tiny_bundle_path), "--verify"]) == 0
    assert "[ok] results of cpu" in capsys.readouterr().out
