"""Fixtures of the exporter's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_stable_diffusion import save_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A diffusers folder with everything, beside `msi.safetensors` and `ir.pth`."""
    return save_folder(tmp_path)
