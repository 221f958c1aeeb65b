"""Loading a folder of the reference family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffveil.bundle import Bundle
from diffveil.cli.main import main
from diffveil.errors import OptionError
from diffveil_export.models.embedded import load_embedded
from diffveil_export.models.reference import is_reference_folder, load_reference
from diffveil_export.reference.autoencoder import FaceDecoder
from tiny_models import randomize, tiny_components, tiny_networks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the recipe leaves behind, for the tiny networks."""
    autoencoder, unet, conditioner, recognizer = tiny_networks()
    model = tmp_path / "source"
    unet.save_pretrained(model / "unet")
    parts = {"autoencoder": autoencoder, "conditioner": conditioner, "recognizer": recognizer}
    for name, module in parts.items():
        (model / name).mkdir()
        (model / name / "config.json").write_text(json.dumps(module.config))
        save_file(module.state_dict(), model / name / "model.safetensors")
    facts = {"name": "faces", "licence": "research", "thresholds": {"far_1e-2": 0.25}}
    (model / "model.json").write_text(json.dumps(facts))
    return model


@torch.no_grad()
def test_loads_the_same_networks(folder: Path) -> None:
    assert is_reference_folder(folder)
    loaded, expected = load_reference(folder), tiny_components()
    assert (loaded.name, loaded.licence) == ("faces", "research")
    assert loaded.thresholds == {"far_1e-2": 0.25}
    assert loaded.dimensions == expected.dimensions
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = expected.autoencoder.encode(image)
    torch.testing.assert_close(loaded.autoencoder.encode(image), latent)
    torch.testing.assert_close(loaded.recognizer(image), expected.recognizer(image))
    torch.testing.assert_close(loaded.embedder(image), expected.embedder(image))
    torch.testing.assert_close(loaded.unconditional, expected.unconditional)
    t, c = torch.tensor([5, 900]), expected.expander(expected.embedder(image)[:, 2])
    torch.testing.assert_close(loaded.unet(latent, t, c), expected.unet(latent, t, c))


@torch.no_grad()
def test_fused_recognizer_is_the_trained_one() -> None:
    *_, recognizer = tiny_networks()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    trained = recognizer(image)
    torch.testing.assert_close(tiny_components().recognizer(image), trained, rtol=1e-4, atol=1e-5)


def test_missing_files_are_named_together(folder: Path) -> None:
    (folder / "unet" / "config.json").unlink()
    (folder / "recognizer" / "model.safetensors").unlink()
    with pytest.raises(OptionError, match=r"unet/config\.json, recognizer/model\.safetensors"):
        load_reference(folder)


def test_missing_and_unexpected_tensors_are_named_together(folder: Path) -> None:
    file = folder / "recognizer" / "model.safetensors"
    state = load_file(file)
    state["extra"] = state.pop("head.bias")
    save_file(state, file)
    with pytest.raises(OptionError, match=r"missing head\.bias, unexpected extra"):
        load_reference(folder)


def test_wrong_configuration_and_facts_are_refused(folder: Path) -> None:
    (folder / "model.json").write_text('{"licence": "x", "author": "y"}')
    with pytest.raises(OptionError, match=r"model\.json"):
        load_reference(folder)
    (folder / "model.json").unlink()
    (folder / "autoencoder" / "config.json").write_text('{"depth": 3}')
    with pytest.raises(OptionError, match="depth"):
        load_reference(folder)


def _guide_decoder(folder: Path, channels: int = 8) -> FaceDecoder:
    decoder = FaceDecoder(channels, (16, 16, 16), (1, 0, 0))
    randomize(decoder, torch.Generator().manual_seed(2))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(decoder.config))
    save_file(decoder.state_dict(), folder / "model.safetensors")
    return decoder.eval()


@torch.no_grad()
def test_a_guide_decoder_travels_into_the_bundle(folder: Path, tmp_path: Path) -> None:
    narrow = _guide_decoder(tmp_path / "narrow")
    options = ["--guide-decoder", str(tmp_path / "narrow"), "-o", str(tmp_path / "bundle")]
    assert main(["export", str(folder), *options]) == 0
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.manifest.provenance["guide_decoder"] == "narrow"
    rebuilt = load_embedded(bundle).guide_parts[0]
    latent = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    assert rebuilt.decode(latent).shape == (2, 3, 32, 32)
    # Rounded as it is stored, so near and not equal; the real decoder is nowhere near.
    error = (rebuilt.decode(latent) - narrow.decode(latent)).norm() / narrow.decode(latent).norm()
    assert error < 0.1


def test_guide_decoders_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    _guide_decoder(tmp_path / "narrow", channels=4)
    with pytest.raises(OptionError, match="decodes 4 latent channels, the model has 8"):
        load_reference(folder, tmp_path / "narrow")
    (tmp_path / "narrow" / "model.safetensors").unlink()
    with pytest.raises(OptionError, match=r"lacks model\.safetensors"):
        load_reference(folder, tmp_path / "narrow")
