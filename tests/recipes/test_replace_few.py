"""A bundle gets the few-step change of another export, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes/reference"))
from replace_few import replace_few

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.golden import check_backend
from diffveil_export.exporter import export_bundle
from diffveil_export.judge import add_judge
from diffveil_export.models.embedded import load_embedded
from judged_bundles import digests, judge_for
from tiny_models import tiny_few_components

CHANGED = {
    "bundle.json",
    "denoise_few.bin",
    "denoise_few.onnx",
    "golden.safetensors",
    "source.safetensors",
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """One that a program has joined, and a fresh export with another change."""
    folder = tmp_path_factory.mktemp("few")
    old, new = (export_bundle(tiny_few_components(s), folder / str(s)).bundle for s in (5, 6))
    return add_judge(old, judge_for(old), folder / "judged"), new


def denoised(bundle: Bundle, seed: int) -> dict[str, np.ndarray]:
    d, rng = bundle.dimensions, np.random.default_rng(seed)
    shape = (3, d.latent_channels, d.latent_size, d.latent_size)
    condition = (3, d.conditioning_length, d.conditioning_width)
    inputs = {
        "latent": rng.standard_normal(shape, np.float32),
        "timestep": np.array([3, 500, 900]),
        "conditioning": rng.standard_normal(condition, np.float32),
    }
    with Programs(bundle, ONNXRuntimeCPU()) as programs:
        return {n: getattr(programs, n)(**inputs) for n in ("denoise", "denoise_few")}


def test_only_the_change_is_replaced(bundles: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    old, new = bundles
    replaced = replace_few(old, new, tmp_path / "bundle")
    before, after = digests(old.path), digests(replaced.path)
    assert {name for name in after if after[name] != before.get(name)} == CHANGED
    assert before.keys() == after.keys()
    seed = int(np.random.default_rng().integers(1000))
    was, theirs, now = (denoised(b, seed) for b in (old, new, replaced))
    np.testing.assert_array_equal(now["denoise"], was["denoise"])
    np.testing.assert_array_equal(now["denoise_few"], theirs["denoise_few"])
    assert np.abs(now["denoise_few"] - was["denoise_few"]).max() > 1e-2
    assert all(check_backend(replaced, ONNXRuntimeCPU()))
    few = load_embedded(replaced).modules()["few"].state_dict()
    for name, value in load_embedded(new).modules()["few"].state_dict().items():
        np.testing.assert_array_equal(few[name].numpy(), value.numpy())


def test_others_are_refused(
    bundles: tuple[Bundle, Bundle], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    old, _ = bundles
    with pytest.raises(SystemExit, match="no few-step change"):
        replace_few(old, tiny_bundle, tmp_path / "bundle")
    components = tiny_few_components(6)
    with torch.no_grad():  # one number, which stands in the program's own file
        components.modules()["recognizer"].get_parameter("head.bias")[0] += 1
    other = export_bundle(components, tmp_path / "other").bundle
    with pytest.raises(SystemExit, match="another model"):
        replace_few(old, other, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
