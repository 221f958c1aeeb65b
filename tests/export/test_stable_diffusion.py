"""The Stable Diffusion family on tiny random models: parts against transformers, and the whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import nn

from diffveil.errors import OptionError
from diffveil.programs import PROGRAMS
from diffveil_export.components import Components
from diffveil_export.exporter import export_bundle
from diffveil_export.gradient import trace_gradient
from diffveil_export.lower import lower
from diffveil_export.models import stable_diffusion
from diffveil_export.models.clip import TextExpander, VisionEmbedder
from diffveil_export.models.irse50 import IRSE50
from diffveil_export.models.msi import MSI, msi_from_state
from diffveil_export.storage import WeightStorage
from diffveil_export.verify import random_inputs
from diffveil_export.wrappers import wrap
from parity import assert_close_to_reference
from tiny_models import randomize
from tiny_stable_diffusion import STAGES, VOCABULARY, parts, text_encoder, vision_tower


@pytest.fixture(scope="module")
def components() -> Components:
    return stable_diffusion.assemble(name="tiny-sd", vocabulary=VOCABULARY, **parts())


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_sizes_follow_from_the_parts(components: Components) -> None:
    d = components.dimensions
    assert (d.image_size, d.latent_channels, d.latent_size) == (32, 4, 16)
    assert (d.token_width, d.conditioning_length, d.conditioning_width) == (16, 9, 16)
    assert d.embedding_width == 10


def test_template_lies_in_the_published_framing(components: Components) -> None:
    eye = components.template[0]
    assert eye == pytest.approx(((32 + 38.29 * 188 / 112) / 8, (35 + 51.70 * 188 / 112) / 8))


@torch.no_grad()
def test_autoencoder_is_diffusers(components: Components, image: torch.Tensor) -> None:
    vae = parts()["vae"].eval()
    latent = components.autoencoder.encode(image)
    expected = vae.encode(image).latent_dist.mean * 0.18215
    torch.testing.assert_close(latent, expected)
    decoded = vae.decode(expected / 0.18215).sample
    torch.testing.assert_close(components.autoencoder.decode(latent), decoded)


@torch.no_grad()
def test_text_encoder_is_transformers() -> None:
    text = text_encoder(torch.Generator().manual_seed(1))
    prompt = torch.tensor([30, 7] + [31] * 7)
    expander = TextExpander(text, prompt, position=1)
    expected = text(prompt[None]).last_hidden_state
    torch.testing.assert_close(expander.encode_prompt(), expected)
    # Putting the placeholder's own embedding back gives the prompt's encoding.
    own = getattr(text, "text_model", text).embeddings.token_embedding.weight[7]
    torch.testing.assert_close(expander(own[None]), expected)
    other = expander(torch.stack([own, own + 1]))
    assert other.shape == (2, 9, 16)
    assert not torch.allclose(other[0], other[1])


@torch.no_grad()
def test_vision_states_are_transformers(image: torch.Tensor) -> None:
    vision = vision_tower(torch.Generator().manual_seed(2))
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, states: list[torch.Tensor]) -> torch.Tensor:
            seen.extend(states)
            return torch.zeros(len(states[0]), 10, 16)

    VisionEmbedder(vision, Spy(), 32)(image)  # type: ignore[arg-type]
    resized = nn.functional.interpolate(
        (image + 1) / 2, (28, 28), mode="bicubic", antialias=True
    ).clamp(0, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)
    result = vision((resized - mean) / std, output_hidden_states=True)
    assert len(seen) == 5
    for state, index in zip(seen, (3, 7, 11, 15, 17), strict=True):
        torch.testing.assert_close(state, result.hidden_states[index], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_release_cast_is_a_conversion_to_bytes(image: torch.Tensor) -> None:
    image = image.clone()
    image[:, :, :5] = -1.0
    image[:, :, 5:9] = 1.0
    vision = vision_tower(torch.Generator().manual_seed(2))
    embedder = VisionEmbedder(vision, MSI(12, 16, 16, 8).eval(), 32, "release-uint8")
    # NumPy's conversion by way of a signed integer wraps around on every platform.
    as_bytes = image.numpy().astype(np.int64).astype(np.uint8)
    assert set(np.unique(as_bytes)) == {0, 1, 255}
    as_rgb = torch.from_numpy(as_bytes).float() / 127.5 - 1
    expected = VisionEmbedder(vision, embedder.msi, 32, "rgb")(as_rgb)
    torch.testing.assert_close(embedder(image), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_msi_stage_by_stage() -> None:
    """The published formula, one stage after the other."""
    generator = torch.Generator().manual_seed(4)
    msi = MSI(12, 16, 16, 8)
    randomize(msi, generator)
    states = [torch.randn(2, 5, 12, generator=generator) for _ in range(5)]
    tokens = msi.eval()(states)
    w = msi.state_dict()

    def attention(name: str, query: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        heads = []
        for q, k, v in zip(
            (query @ w[f"{name}.to_q.weight"].T).split(2, 1),
            (context @ w[f"{name}.to_k.weight"].T).split(2, 1),
            (context @ w[f"{name}.to_v.weight"].T).split(2, 1),
            strict=True,
        ):
            score = (q * k).sum(1, keepdim=True) / math.sqrt(2)
            heads.append(score.unsqueeze(1).softmax(1).squeeze(1) * v)
        joined = torch.cat(heads, 1)
        return joined @ w[f"{name}.to_out.0.weight"].T + w[f"{name}.to_out.0.bias"]

    for stage in range(10):
        scale = stage // 2
        x = states[scale].mean(1) @ w[f"mlp{scale}.linear1.weight"].T
        x = x @ w[f"mlp{scale}.linear2.weight"].T
        x = x / x.norm(dim=1, keepdim=True) * w["t_embed1.weight"][stage]
        y = attention("attn2", attention("attn1", x, x), x)
        expected = y @ w["net.1.weight"].T + w["net.1.bias"]
        torch.testing.assert_close(tokens[:, stage], expected, rtol=1e-4, atol=1e-5)


def test_msi_weights_are_checked_by_name() -> None:
    state = MSI(12, 16, 16, 8).state_dict()
    assert msi_from_state(state).attn1.heads == 8
    state["surprise"] = state.pop("net.1.bias")
    state["attn2.to_k.weight"] = torch.zeros(3, 3)
    with pytest.raises(OptionError) as caught:
        msi_from_state(state)
    message = str(caught.value)
    assert "missing net.1.bias" in message
    assert "unexpected surprise" in message
    assert "attn2.to_k.weight: received [3, 3], expected [16, 16]" in message


def test_irse50_has_its_published_size() -> None:
    with torch.device("meta"):
        model = IRSE50()
    parameters = sum(p.numel() for p in model.parameters())
    assert len(model.body) == 24
    assert parameters == pytest.approx(43.8e6, rel=0.005)
    assert model(torch.zeros(2, 3, 112, 112, device="meta")).shape == (2, 512)


def test_guide_exports_through_attention_and_upsampling(
    components: Components, tmp_path: Path
) -> None:
    """The gradient through AutoencoderKL and IR-SE50, as ONNX, against autograd."""
    spec = PROGRAMS["guide"]
    generator = torch.Generator().manual_seed(5)
    guide = wrap(components, "guide")
    example = random_inputs(spec, components.dimensions, 2, generator)
    traced = trace_gradient(guide, example, ((0,), (0,), (0,), (0,), (0, 1)))
    assert not [n for n in traced.graph.nodes if "backward" in str(n.target)]
    model = lower(traced, spec, example)
    # Operators that TensorRT does not know, or knows only in part.
    kinds = {node.op_type for node in model.graph.all_nodes()}
    assert not kinds & {"ScatterND", "ScatterElements", "NonZero", "Loop", "If", "Scan"}
    ir.save(model, tmp_path / "guide.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "guide.onnx"), providers=["CPUExecutionProvider"]
    )
    for batch in (1, 3):
        inputs = random_inputs(spec, components.dimensions, batch, generator)
        feed = {t.name: x.numpy() for t, x in zip(spec.inputs, inputs, strict=True)}
        assert_close_to_reference(guide, inputs, session.run(None, feed))


def _load(folder: Path, **changes: Any) -> Components:
    arguments = {
        "msi": folder.parent / "msi.safetensors",
        "recognizer": folder.parent / "ir.pth",
        **changes,
    }
    return stable_diffusion.load_stable_diffusion(folder, **arguments)


@torch.no_grad()
def test_folder_loads_to_the_same_networks(
    folder: Path, components: Components, image: torch.Tensor
) -> None:
    loaded = _load(folder)
    assert loaded.name == "model"
    assert loaded.dimensions == components.dimensions
    torch.testing.assert_close(loaded.unconditional, components.unconditional)
    torch.testing.assert_close(loaded.recognizer(image), components.recognizer(image))
    torch.testing.assert_close(loaded.embedder(image), components.embedder(image))


@torch.no_grad()
def test_an_ensemble_and_released_msi_weights(
    folder: Path, components: Components, image: torch.Tensor, tmp_path: Path
) -> None:
    """Two recognizers count as one whose cosine is the mean of theirs."""
    msi = MSI(12, 16, 16, 8)
    msi.load_state_dict(parts()["msi_state"])
    torch.save({"string_to_token": {}, "attention": msi}, tmp_path / "embeddings.pt")
    second = IRSE50(6, STAGES)
    randomize(second, torch.Generator().manual_seed(9))
    torch.save(second.state_dict(), tmp_path / "second.pth")
    files = [folder.parent / "ir.pth", tmp_path / "second.pth"]
    loaded = _load(folder, msi=tmp_path / "embeddings.pt", recognizer=files)
    torch.testing.assert_close(loaded.embedder(image), components.embedder(image))
    assert loaded.dimensions.embedding_width == 16
    alone = _load(folder, recognizer=files[1]).recognizer(image)
    first, both = components.recognizer(image), loaded.recognizer(image)
    mean = (first @ first.T + alone @ alone.T) / 2
    torch.testing.assert_close(both @ both.T, mean, rtol=1e-5, atol=1e-5)
    assert loaded.provenance["recognizer_2_family"].startswith("ir-se50")


def test_missing_parts_are_named_together(folder: Path) -> None:
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer").rmdir()
    with pytest.raises(OptionError) as caught:
        _load(folder, msi=folder / "none.safetensors")
    assert "tokenizer" in str(caught.value)
    assert "none.safetensors" in str(caught.value)


def test_other_schedules_are_refused(folder: Path) -> None:
    DDIMScheduler(beta_schedule="linear", prediction_type="v_prediction").save_pretrained(
        folder / "scheduler"
    )
    with pytest.raises(OptionError, match=r"beta_schedule.*prediction_type"):
        _load(folder)


def test_code_in_weight_files_does_not_run(folder: Path, tmp_path: Path) -> None:
    torch.save(IRSE50(10, STAGES), tmp_path / "module.pth")  # a pickled object, not a state dict
    with pytest.raises(OptionError, match="state dict"):
        _load(folder, recognizer=tmp_path / "module.pth")


def test_another_recognizers_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(OptionError, match=r"no known family.*ONNX"):
        _load(folder, recognizer=tmp_path / "other.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float32", "float16"])
def test_whole_bundle_exports(
    weights: WeightStorage, components: Components, tmp_path: Path
) -> None:
    """All seven programs; the export itself checks each against PyTorch."""
    result = export_bundle(components, tmp_path / "bundle", weights=weights)
    assert all(result.parity)
    assert {row.program for row in result.parity} == set(PROGRAMS)
    assert result.bundle.manifest.provenance["msi_input"] == "rgb"
