"""A bundle gets the few-step change of another export, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes/reference"))
from replace_few import replace_few
from test_few_steps import few_state

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.golden import check_backend
from diffveil_export.exporter import export_bundle
from diffveil_export.models.embedded import load_embedded
from diffveil_export.models.reference import apply_few, assemble
from tiny_models import tiny_networks


def exported(folder: Path, *, few: int) -> Bundle:
    autoencoder, unet, conditioner, recognizer = tiny_networks(3)
    components = assemble(
        name="tiny-few",
        autoencoder=autoencoder,
        unet=unet,
        conditioner=conditioner,
        recognizer=recognizer,
        few=apply_few(unet, few_state(unet, few)),
        licence="none: random weights",
    )
    return export_bundle(components, folder).bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("few")
    return exported(folder / "old", few=5), exported(folder / "new", few=6)


def denoised(bundle: Bundle, seed: int) -> dict[str, np.ndarray]:
    d, rng = bundle.dimensions, np.random.default_rng(seed)
    shape = (3, d.latent_channels, d.latent_size, d.latent_size)
    inputs = {
        "latent": rng.standard_normal(shape, np.float32),
        "timestep": np.array([3, 500, 900]),
        "conditioning": rng.standard_normal(
            (3, d.conditioning_length, d.conditioning_width), np.float32
        ),
    }
    with Programs(bundle, ONNXRuntimeCPU()) as programs:
        return {n: getattr(programs, n)(**inputs) for n in ("denoise", "denoise_few")}


def test_only_the_change_is_replaced(bundles: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    old, new = bundles
    replaced = replace_few(old, new, tmp_path / "bundle")
    assert replaced.fingerprint == old.fingerprint
    seed = int(np.random.default_rng().integers(1000))
    before, theirs, now = (denoised(b, seed) for b in (old, new, replaced))
    np.testing.assert_array_equal(now["denoise"], before["denoise"])
    np.testing.assert_array_equal(now["denoise_few"], theirs["denoise_few"])
    assert np.abs(now["denoise_few"] - before["denoise_few"]).max() > 1e-2
    assert all(check_backend(replaced, ONNXRuntimeCPU()))
    few = load_embedded(replaced).modules()["few"].state_dict()
    for name, value in load_embedded(new).modules()["few"].state_dict().items():
        np.testing.assert_array_equal(few[name].numpy(), value.numpy())


def test_another_models_change_is_refused(
    bundles: tuple[Bundle, Bundle], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="another model"):
        replace_few(bundles[0], tiny_bundle, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
