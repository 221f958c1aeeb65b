"""16-bit programs: islands, loss scale and extremes, on tiny models of both families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffveil.errors import OptionError
from diffveil.programs import PROGRAMS
from diffveil_export.components import Components
from diffveil_export.gradient import trace_gradient
from diffveil_export.lower import BFLOAT16_OPSET, OPSET, lower
from diffveil_export.passes.fold_weights import FoldWeights
from diffveil_export.passes.widen_bfloat16 import WidenBFloat16
from diffveil_export.precision import (
    InPrecision,
    Precision,
    arithmetic,
    choose_loss_scale,
    float_dtype,
)
from diffveil_export.verify import random_inputs
from diffveil_export.wrappers import Guide, wrap
from tiny_models import randomize, tiny_components

HALF = torch.float16
BATCH = ((0,), (0,), (0,), (0,), (0, 1))


@pytest.fixture(scope="module")
def components() -> Components:
    return tiny_components(3)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(8)


def test_products_are_16_bit_and_norms_are_not(generator: torch.Generator) -> None:
    x = torch.randn(2, 4, 6, 6, generator=generator)
    weight = torch.randn(8, 4, 3, 3, generator=generator)
    with arithmetic("float16"):
        y = F.conv2d(x, weight)
        assert y.dtype == HALF
        # Squares of these sum to more than float16 can hold; the island does not care.
        normed = F.group_norm(y * 1000, 2)
        assert normed.dtype == HALF
        assert normed.isfinite().all()
        assert F.layer_norm(y * 1000, y.shape[3:]).isfinite().all()
        assert (y + x.new_ones(1)).dtype == HALF
        assert (x * 2).dtype == torch.float32  # nothing of 16 bits came near it
        assert F.normalize(y.flatten(1)).dtype == torch.float32
        assert y.mean((2, 3)).dtype == HALF
    torch.testing.assert_close(
        normed.float(), F.group_norm(F.conv2d(x, weight) * 1000, 2), rtol=2e-2, atol=2e-2
    )
    assert F.conv2d(x, weight).dtype == torch.float32  # the rules end with the block


@pytest.mark.parametrize("masked", [False, True])
def test_attention_survives_scores_that_float16_cannot_hold(
    generator: torch.Generator, masked: bool
) -> None:
    q, k, v = (torch.randn(2, 3, 5, 16, generator=generator) for _ in range(3))
    q, k = q * 60, k * 60  # q·kᵀ is about 10⁵ before the factor 1/√d
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked else None
    with arithmetic("float16"):
        ours = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=masked)
    assert ours.dtype == HALF
    expected = F.scaled_dot_product_attention(q.half().float(), k.half().float(), v, attn_mask=mask)
    # Scores of 10⁴ carry float16's roundoff of 5, so a near tie may fall either way.
    near = torch.isclose(ours.float(), expected, rtol=2e-2, atol=2e-2).float().mean()
    assert near > 0.9
    torch.testing.assert_close(causal, ours, rtol=0, atol=0)


def test_timesteps_stay_exact() -> None:
    """999 times a frequency, in float16, would be off by half a radian."""
    t = torch.tensor([999.0])
    frequency = torch.linspace(0.5, 1, 7)
    with arithmetic("float16"):
        phase = torch.sin(t[:, None] * frequency[None])
    torch.testing.assert_close(phase, torch.sin(t[:, None] * frequency[None]), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_programs_stay_close_and_typed(
    name: str,
    precision: Precision,
    components: Components,
    generator: torch.Generator,
    tmp_path: Path,
) -> None:
    """Against PyTorch in float32, at other batches than the traced one, with extremes too."""
    model = _lowered(name, precision, components, generator)
    kinds = {(n.op_type, n.outputs[0].dtype) for n in model.graph}
    for op, dtype in kinds:
        if op == "Conv":
            assert dtype == ir.DataType[precision.upper()]
        if op in ("Softmax", "LayerNormalization", "InstanceNormalization"):
            assert dtype == ir.DataType.FLOAT
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.dtype in (ir.DataType.FLOAT, ir.DataType.INT64)
    if precision == "bfloat16":
        assert WidenBFloat16()(model).modified
    ir.save(model, tmp_path / "program.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(tmp_path / "program.onnx"), options, providers=["CPUExecutionProvider"]
    )
    reference = wrap(components, name)
    # Roundoff u = 2⁻¹¹ or 2⁻⁸; a network of this depth is off by some tens of u at most.
    worst = 1e-3 if precision == "float16" else 3e-2
    spec = PROGRAMS[name]
    for batch in (1, 3):
        inputs = random_inputs(spec, components.dimensions, batch, generator)
        feed = {t.name: x.numpy() for t, x in zip(spec.inputs, inputs, strict=True)}
        outputs = session.run(None, feed)
        with torch.no_grad():
            expected = reference(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for ours, theirs in zip(outputs, expected, strict=True):
            a, b = ours.astype(np.float64).ravel(), theirs.numpy().astype(np.float64).ravel()
            assert 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) < worst
            assert abs(np.linalg.norm(a) / np.linalg.norm(b) - 1) < 10 * worst

        extreme = {
            key: value if value.dtype == np.int64 else np.clip(value * 30, -1e2, 1e2)
            for key, value in feed.items()
        }
        if "image" in extreme:
            extreme["image"] = np.sign(feed["image"])
        if "timestep" in extreme:
            extreme["timestep"] = np.array([0, 999, 500])[:batch]
        assert all(np.isfinite(output).all() for output in session.run(None, extreme))


def _lowered(
    name: str, precision: Precision, components: Components, generator: torch.Generator
) -> ir.Model:
    spec = PROGRAMS[name]
    inputs = random_inputs(spec, components.dimensions, 2, generator)
    scale = 1.0
    if name == "guide":
        parts: list[Any] = [components.autoencoder, components.recognizer]
        if precision == "float16":
            scale, _ = choose_loss_scale(wrap(components, "guide"), inputs, parts)
        guide = Guide(*parts, precision, scale).eval()
        module: nn.Module = trace_gradient(guide, inputs, BATCH)
    else:
        module = InPrecision(wrap(components, name), precision)
    opset = BFLOAT16_OPSET if precision == "bfloat16" else OPSET
    model = lower(module, spec, inputs, opset=opset)
    FoldWeights()(model)
    return model


class _Faint(nn.Module):
    """Decoder and recognizer in one, with gradients that float16 has no digits for."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 6, 3, padding=1)
        self.second = nn.Linear(6 * 16, 5)
        randomize(self, generator)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = self.first(latent) * 3e-4
        return image

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        # A large constant part leaves the identity little influence, as in a trained recognizer.
        return F.normalize(self.second((image * 3e-3).flatten(1)) + 40, dim=1)


def test_loss_scale_keeps_gradients_that_float16_would_lose(generator: torch.Generator) -> None:
    network = _Faint(generator).eval().requires_grad_(False)
    inputs = (
        torch.randn(2, 8, 4, 4, generator=generator),
        F.normalize(torch.randn(2, 5, generator=generator), dim=1),
        torch.ones(2),
        torch.ones(2),
        torch.zeros(2, 2),
    )
    exact = Guide(network, network)(*inputs)[0].double().flatten()
    assert 0 < exact.abs().max() < 1e-7
    scale, outputs = choose_loss_scale(Guide(network, network), inputs, [network])
    torch.testing.assert_close(outputs[0].double().flatten(), exact)
    assert scale >= 2**16
    plain = Guide(network, network, "float16")(*inputs)[0].double().flatten()
    scaled = Guide(network, network, "float16", scale)(*inputs)[0].double().flatten()
    assert F.cosine_similarity(scaled, exact, 0) > 0.999
    assert scaled.norm() / exact.norm() == pytest.approx(1, abs=0.01)
    assert not F.cosine_similarity(plain, exact, 0) > 0.9


def test_loss_scale_leaves_room_above(generator: torch.Generator) -> None:
    class Steep(_Faint):
        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            image: torch.Tensor = self.first(latent * 200)
            return image

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return F.normalize(self.second(image.flatten(1)), dim=1) * 40

    network = Steep(generator).eval().requires_grad_(False)
    inputs = (
        torch.randn(1, 8, 4, 4, generator=generator) * 1e-3,
        F.normalize(torch.randn(1, 5, generator=generator), dim=1),
        torch.ones(1),
        torch.ones(1),
        torch.zeros(1, 1),
    )
    scale, outputs = choose_loss_scale(Guide(network, network), inputs, [network])
    assert scale * outputs[0].abs().max() <= 65504 / 16
    assert np.log2(scale) == int(np.log2(scale))
    gradient = Guide(network, network, "float16", scale)(*inputs)[0]
    assert gradient.isfinite().all()


def test_unknown_precisions_are_named() -> None:
    with pytest.raises(OptionError, match="received 'float8', expected one of"):
        float_dtype("float8")  # type: ignore[arg-type]
    with pytest.raises(OptionError), arithmetic("int8"):  # type: ignore[arg-type]
        pass
