"""Fixtures of the exporter's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffveil.bundle import Bundle
from tiny_stable_diffusion import save_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A diffusers folder with everything, beside `msi.safetensors` and `ir.pth`."""
    return save_folder(tmp_path)


@pytest.fixture(scope="session")
def looped(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with programs `predict`, `steer` and `advance`, and fake engines. Read only."""
    from diffveil_export.loop_programs import add_loop_programs
    from fake_trt_runtime import write_engines

    bundle = add_loop_programs(tiny_bundle, tmp_path_factory.mktemp("looped") / "bundle")
    write_engines(bundle)
    return bundle
