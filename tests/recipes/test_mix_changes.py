"""The mean of low-rank changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes/reference"))
from mix_changes import main


def change(scale: float) -> dict[str, torch.Tensor]:
    return {"a.down.weight": torch.full((2, 3), scale), "a.up.weight": torch.full((3, 2), -scale)}


def test_every_factor_is_the_mean(tmp_path: Path) -> None:
    files = [tmp_path / f"{scale}.safetensors" for scale in (1, 2, 6)]
    for file in files:
        save_file(change(float(file.stem)), file)
    main([*map(str, files), "-o", str(tmp_path / "mean.safetensors")])
    for name, value in load_file(tmp_path / "mean.safetensors").items():
        torch.testing.assert_close(value, change(3.0)[name])
    assert not list(tmp_path.glob("*.partial"))


def test_changes_of_other_networks_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(change(1.0), files[0])
    save_file({"a.down.weight": torch.zeros(4, 3)}, files[1])
    with pytest.raises(SystemExit, match="stages of one run"):
        main([*map(str, files), "-o", str(tmp_path / "mean.safetensors")])
    assert not (tmp_path / "mean.safetensors").exists()
