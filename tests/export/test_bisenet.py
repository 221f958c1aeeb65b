"""Face parsing: the network against a plain functional forward, and the program `parse`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU
from diffveil.errors import BundleError, OptionError
from diffveil.golden import require_golden
from diffveil.programs import PROGRAMS
from diffveil_export.exporter import export_bundle
from diffveil_export.models.bisenet import (
    FACE_CLASSES,
    BiSeNet,
    FaceParser,
    bisenet_from_state,
    load_parser,
)
from tiny_models import randomize, tiny_components

State = dict[str, torch.Tensor]


def _network(seed: int = 0, width: int = 8) -> BiSeNet:
    network = BiSeNet(width)
    randomize(network, torch.Generator().manual_seed(seed))
    return network.eval()


def _norm(w: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(
        x,
        w[f"{name}.running_mean"],
        w[f"{name}.running_var"],
        w[f"{name}.weight"],
        w[f"{name}.bias"],
    )


def _cbr(w: State, name: str, x: torch.Tensor, padding: int = 1) -> torch.Tensor:
    return F.relu(_norm(w, f"{name}.bn", F.conv2d(x, w[f"{name}.conv.weight"], padding=padding)))


def _block(w: State, name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
    y = F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1)
    y = F.relu(_norm(w, f"{name}.bn1", y))
    y = _norm(w, f"{name}.bn2", F.conv2d(y, w[f"{name}.conv2.weight"], padding=1))
    if f"{name}.downsample.0.weight" in w:
        x = F.conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride)
        x = _norm(w, f"{name}.downsample.1", x)
    return F.relu(x + y)


def _attend(w: State, name: str, x: torch.Tensor) -> torch.Tensor:
    x = _cbr(w, f"{name}.conv", x)
    a = F.conv2d(F.adaptive_avg_pool2d(x, 1), w[f"{name}.conv_atten.weight"])
    return x * _norm(w, f"{name}.bn_atten", a).sigmoid()


def _oracle(w: State, x: torch.Tensor) -> torch.Tensor:
    """The published network, written out from its state dict."""
    x = F.conv2d(x, w["cp.resnet.conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(_norm(w, "cp.resnet.bn1", x)), 3, 2, 1)
    features = []
    for layer in (1, 2, 3, 4):
        x = _block(w, f"cp.resnet.layer{layer}.0", x, 1 if layer == 1 else 2)
        x = _block(w, f"cp.resnet.layer{layer}.1", x, 1)
        features.append(x)
    _, f8, f16, f32 = features
    average = _cbr(w, "cp.conv_avg", F.adaptive_avg_pool2d(f32, 1), 0)
    up = F.interpolate(average, f32.shape[2:], mode="nearest") + _attend(w, "cp.arm32", f32)
    up = _cbr(w, "cp.conv_head32", F.interpolate(up, f16.shape[2:], mode="nearest"))
    up = _attend(w, "cp.arm16", f16) + up
    up = _cbr(w, "cp.conv_head16", F.interpolate(up, f8.shape[2:], mode="nearest"))
    x = _cbr(w, "ffm.convblk", torch.cat([f8, up], 1), 0)
    a = F.relu(F.conv2d(F.adaptive_avg_pool2d(x, 1), w["ffm.conv1.weight"]))
    x = x * F.conv2d(a, w["ffm.conv2.weight"]).sigmoid() + x
    return F.conv2d(_cbr(w, "conv_out.conv", x), w["conv_out.conv_out.weight"])


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 64, 64), (3, 32, 96)])
def test_network_is_the_published_one(size: tuple[int, int, int]) -> None:
    network = _network().double()
    batch, height, width = size
    image = torch.randn(batch, 3, height, width, dtype=torch.float64)
    torch.testing.assert_close(network(image), _oracle(network.state_dict(), image))


def test_published_width_has_the_published_names() -> None:
    with torch.device("meta"):
        state = BiSeNet().state_dict()
    assert state["cp.resnet.layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert state["cp.arm32.conv_atten.weight"].shape == (128, 128, 1, 1)
    assert state["ffm.conv1.weight"].shape == (64, 256, 1, 1)
    assert state["conv_out.conv_out.weight"].shape == (19, 256, 1, 1)


@torch.no_grad()
def test_face_is_the_sum_of_its_classes() -> None:
    network = _network(1)
    parser = FaceParser(network, 24, side=64).eval()
    image = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    x = F.interpolate((image + 1) / 2, (64, 64), mode="bilinear")
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
    face = network((x - mean) / std).softmax(1)[:, list(FACE_CLASSES)].sum(1, keepdim=True)
    expected = F.interpolate(face, (24, 24), mode="bilinear")
    torch.testing.assert_close(parser(image), expected, rtol=1e-4, atol=1e-5)
    assert 17 not in FACE_CLASSES  # hair


def test_files_are_read_by_name(tmp_path: Path) -> None:
    state = {f"module.{n}": t for n, t in _network(3).state_dict().items()}
    state["module.conv_out16.conv_out.weight"] = torch.zeros(1)  # trains only
    torch.save(state, tmp_path / "parser.pth")
    loaded = load_parser(tmp_path / "parser.pth", 32).network
    torch.testing.assert_close(loaded.state_dict(), _network(3).state_dict())
    state = {n: t for n, t in _network(3).state_dict().items() if n != "ffm.conv1.weight"}
    state["surprise"] = torch.zeros(1)
    state["conv_out.conv_out.weight"] = torch.zeros(3, 32, 1, 1)
    save_file(state, tmp_path / "parser.safetensors")
    with pytest.raises(OptionError) as caught:
        load_parser(tmp_path / "parser.safetensors", 32)
    message = str(caught.value)
    assert "missing ffm.conv1.weight" in message
    assert "unexpected surprise" in message
    assert "conv_out.conv_out.weight: received [3, 32, 1, 1], expected [19, 32, 1, 1]" in message
    with pytest.raises(OptionError, match="missing cp"):
        bisenet_from_state({})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny model with a parser."""
    parser = FaceParser(_network(4), 32, side=64)
    folder = tmp_path_factory.mktemp("parse") / "bundle"
    return export_bundle(replace(tiny_components(), parser=parser), folder).bundle


def test_bundles_hold_the_program(bundle: Bundle, tiny_bundle: Bundle) -> None:
    assert list(bundle.manifest.programs) == [*PROGRAMS, "parse"]
    assert [row.output for row in bundle.program("parse").parity] == ["face"] * 3
    require_golden(bundle, ONNXRuntimeCPU(threads=1))
    with pytest.raises(BundleError, match="no program 'parse'"):
        tiny_bundle.program("parse")


def test_what_is_no_face_stays_the_photos(bundle: Bundle, tiny_bundle: Bundle) -> None:
    """The latent mask is the ellipse times what the parser says, cell by cell."""
    from diffveil.engines import Programs
    from diffveil.facebatch import FaceBatch
    from diffveil.masks import fitted_mask, latent_mask

    crops = np.random.default_rng(3).uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)
    backend = ONNXRuntimeCPU(threads=1)
    with Programs(bundle, backend) as programs, Programs(tiny_bundle, backend) as plain:
        masks = FaceBatch(programs, crops, 2).masks
        ellipse = FaceBatch(plain, crops, 2).masks
        face = programs.parse(image=crops)
    assert masks.shape == ellipse.shape == (3, 1, 4, 4)
    assert masks.dtype == ellipse.dtype == np.float32
    whole = fitted_mask(32, bundle.template, bundle.template)
    for mask, own, part in zip(masks, ellipse, face, strict=True):
        np.testing.assert_array_equal(own[0], latent_mask(whole, 4))
        np.testing.assert_allclose(mask[0], latent_mask(whole * part[0], 4), rtol=1e-6)
    assert (masks <= ellipse + 1e-6).all()
    assert (masks < 0.9 * ellipse).any()
