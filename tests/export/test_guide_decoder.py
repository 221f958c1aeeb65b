"""`guide` through a small decoder: the gradient that ships is autograd's through that decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderTiny

from diffveil.errors import OptionError
from diffveil.programs import PROGRAMS
from diffveil_export.gradient import trace_gradient
from diffveil_export.lower import lower
from diffveil_export.models.stable_diffusion import load_stable_diffusion
from diffveil_export.models.tiny_decoder import TinyDecoder
from diffveil_export.verify import random_inputs
from diffveil_export.wrappers import wrap
from parity import assert_close_to_reference
from tiny_models import randomize, tiny_components


def _tiny(channels: int, levels: int) -> Any:
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
        latent_channels=channels,
    )
    randomize(tiny, torch.Generator().manual_seed(4))
    return tiny.eval()


def test_the_exported_gradient_is_autograds(tmp_path: Path) -> None:
    full = tiny_components(2)
    components = replace(full, guide_decoder=TinyDecoder(_tiny(8, 4)))
    spec, generator = PROGRAMS["guide"], torch.Generator().manual_seed(5)
    guide = wrap(components, "guide")
    example = random_inputs(spec, components.dimensions, 2, generator)
    traced = trace_gradient(guide, example, ((0,), (0,), (0,), (0,), (0, 1)))
    ir.save(lower(traced, spec, example), tmp_path / "guide.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "guide.onnx"), providers=["CPUExecutionProvider"]
    )
    for batch in (1, 3):
        inputs = random_inputs(spec, components.dimensions, batch, generator)
        feed = {t.name: x.numpy() for t, x in zip(spec.inputs, inputs, strict=True)}
        assert_close_to_reference(guide, inputs, session.run(None, feed))
        other = wrap(full, "guide")(*inputs)[0]
        assert not torch.allclose(other, guide(*inputs)[0], rtol=0.1)


@torch.no_grad()
def test_it_comes_from_a_diffusers_folder(folder: Path, tmp_path: Path) -> None:
    files = {"msi": folder.parent / "msi.safetensors", "recognizer": folder.parent / "ir.pth"}
    tiny = _tiny(4, 2)
    tiny.save_pretrained(tmp_path / "taesd")
    loaded = load_stable_diffusion(folder, guide_decoder=tmp_path / "taesd", **files)
    assert loaded.provenance["guide_decoder"] == "taesd"
    assert loaded.guide_decoder is not None
    latent = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded.guide_decoder.decode(latent), tiny.decode(latent).sample)


@pytest.mark.parametrize(
    ("channels", "levels", "message"),
    [
        (3, 2, "decodes 3 latent channels, the model has 4"),
        (4, 3, r"gives photos \[1, 3, 64, 64\]"),
    ],
)
def test_decoders_that_do_not_fit(
    channels: int, levels: int, message: str, folder: Path, tmp_path: Path
) -> None:
    files = {"msi": folder.parent / "msi.safetensors", "recognizer": folder.parent / "ir.pth"}
    _tiny(channels, levels).save_pretrained(tmp_path / "taesd")
    with pytest.raises(OptionError, match=message):
        load_stable_diffusion(folder, guide_decoder=tmp_path / "taesd", **files)
