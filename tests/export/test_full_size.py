"""A model of Stable Diffusion 1.x's size with random weights: exported, verified and built.

Slow: about ten minutes on two cores, 16 GiB of memory and 6 GB of disk (`make test-slow`).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from diffveil.bundle import Bundle
from diffveil.cli.main import main
from diffveil_export.components import Components
from diffveil_export.exporter import export_bundle
from diffveil_export.models.irse50 import IRSE50
from diffveil_export.models.msi import MSI
from diffveil_export.models.stable_diffusion import assemble
from diffveil_export.sources.single_file import CLIP_VOCABULARY

pytestmark = pytest.mark.slow

GIB = 2**30


def _model() -> Components:
    torch.manual_seed(0)
    vae_class: Any = AutoencoderKL
    vae = vae_class(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    unet_class: Any = UNet2DConditionModel
    unet = unet_class(sample_size=64, cross_attention_dim=768)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
        )
    )
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
        )
    )
    return assemble(
        name="full-size",
        vae=vae,
        unet=unet,
        text=text,
        vision=vision,
        vocabulary=CLIP_VOCABULARY,
        msi_state=MSI(1024, 768, 320, 8).state_dict(),
        recognizer=IRSE50(),
        licence="none: random weights",
    )


def _peak_bytes() -> int:
    """Most memory that this process has held."""
    status = Path("/proc/self/status").read_text()
    (line,) = (row for row in status.splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("full-size") / "bundle"
    components = _model()
    assert sum(p.numel() for p in components.modules()["unet"].parameters()) > 850e6
    begun = time.monotonic()

    def say(text: str) -> None:
        spent = time.monotonic() - begun
        sys.stdout.write(f"{spent:6.1f} s  {_peak_bytes() / GIB:5.2f} GiB  {text}\n")

    result = export_bundle(components, folder, precision="float16", progress=say)
    say("done")
    for r in result.parity:
        sys.stdout.write(
            f"{r.program} {r.output} {r.max_rel:.1e} {r.cosine:.6f} {r.norm_ratio:.4f}\n"
        )
    return result.bundle


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's memory record")
def test_it_exports_in_16_gib_and_agrees_with_pytorch(exported: Bundle) -> None:
    assert _peak_bytes() < 16 * GIB
    programs = exported.manifest.programs
    for program in programs.values():
        assert program.precision == "float16"
        assert program.parity
    (gradient,) = (row for row in programs["guide"].parity if row.output == "gradient")
    assert gradient.cosine is not None
    assert gradient.norm_ratio is not None
    assert gradient.cosine >= 0.999
    assert abs(gradient.norm_ratio - 1) < 0.01
    assert programs["guide"].loss_scale is not None
    assert programs["guide"].loss_scale > 1
    # Weights are shared: guide and decode hold the same decoder.
    assert exported.manifest.files["weights.bin"].bytes < 3.2e9
    cost = programs["denoise"].cost
    assert cost is not None
    assert 0.6e12 < cost.flops < 1.0e12
    for name in programs:
        model = ir.load(exported.path / f"{name}.onnx")
        assert len(model.graph.inputs) == len(programs[name].inputs)  # one graph, whole


@pytest.mark.parametrize("program", ["denoise", "guide"])
def test_engines_are_built_without_a_gpu(program: str, exported: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    words = ["build", str(exported.path), "--backend", "tensorrt-rtx", "--target", "89"]
    assert main([*words, "--batch", "1,4", "--programs", program, "--json"]) == 0
    (engine,) = exported.path.glob(f"engines/*/{program}.engine")
    assert engine.stat().st_size > 1e8
