"""Recognizers of known families: sizes, detection, preprocessing, ensembles, guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper, parser
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import interpolate, normalize

from diffveil.errors import OptionError
from diffveil.programs import PROGRAMS
from diffveil_export.components import Components
from diffveil_export.gradient import trace_gradient
from diffveil_export.lower import lower
from diffveil_export.models.irse50 import IRSE50
from diffveil_export.models.recognizers import (
    FacePreprocessing,
    InceptionResnetV1,
    IResNet,
    MobileFaceNet,
    RecognizerEnsemble,
    load_recognizer,
)
from diffveil_export.models.recognizers.iresnet import DEPTHS
from diffveil_export.models.stable_diffusion import CroppedRecognizer
from diffveil_export.verify import random_inputs
from diffveil_export.wrappers import wrap
from parity import assert_close_to_reference
from tiny_models import randomize, tiny_components

SIZES: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "iresnet-18": (lambda: IResNet(DEPTHS[18]), 112, 24.03e6),
    "iresnet-34": (lambda: IResNet(DEPTHS[34]), 112, 34.14e6),
    "iresnet-50": (lambda: IResNet(DEPTHS[50]), 112, 43.59e6),
    "iresnet-100": (lambda: IResNet(DEPTHS[100]), 112, 65.15e6),
    "inception-resnet-v1": (InceptionResnetV1, 160, 23.48e6),
    "mobilefacenet": (MobileFaceNet, 112, 1.2e6),
}


@pytest.mark.parametrize("name", SIZES)
def test_networks_have_their_published_size(name: str) -> None:
    build, side, parameters = SIZES[name]
    with torch.device("meta"):
        network = build()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.003)
    assert network(torch.zeros(2, 3, side, side, device="meta")).shape == (2, 512)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "ir-se50": lambda: IRSE50(10, ((16, 1), (32, 2))),
    "iresnet": lambda: IResNet((1, 2, 1, 1), 10, (4, 4, 6, 8, 8)),
    "inception-resnet-v1": lambda: InceptionResnetV1(12, (1, 2, 1), 16),
    "mobilefacenet": lambda: MobileFaceNet(10, (4, 4, 6, 6, 8), (8, 6, 12, 10, 16, 8), (1, 2, 1)),
}


def _small(name: str, seed: int = 0) -> nn.Module:
    network = SMALL[name]()
    randomize(network, torch.Generator().manual_seed(seed))
    return network.eval().requires_grad_(False)


def _faces(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, 112, 112, generator=torch.Generator().manual_seed(8)) * 2 - 1


@pytest.mark.parametrize("wrapped", ["", "module.", "module.backbone."])
@pytest.mark.parametrize("name", SMALL)
def test_families_are_told_from_their_tensors(name: str, wrapped: str, tmp_path: Path) -> None:
    network = _small(name)
    state = {f"{wrapped}{n}": t for n, t in network.state_dict().items()}
    if wrapped:  # other writers leave counters out, and store halves
        state = {n: t.half() for n, t in state.items() if not n.endswith("batches_tracked")}
        network.half().float()
    if name == "inception-resnet-v1":
        state[f"{wrapped}logits.weight"] = torch.zeros(5, 12)
    file = tmp_path / "weights.pt"
    torch.save(state, file)
    loaded = load_recognizer([file])
    assert loaded.family == name
    assert loaded.provenance["recognizer_file"] == "weights.pt"
    assert loaded.provenance["recognizer_input"] == "rgb-unit"
    assert len(loaded.provenance["recognizer_sha256"]) == 64
    assert not loaded.module.training
    faces = _faces()
    expected = faces
    if name == "inception-resnet-v1":  # its own size, and (pixel - 127.5) / 128
        expected = interpolate(faces, (160, 160), mode="bilinear") * (127.5 / 128)
    actual = loaded.module(faces)
    assert actual.shape == (3, loaded.embedding_width)
    torch.testing.assert_close(actual, network(expected), rtol=1e-4, atol=1e-5)


def test_depth_is_part_of_the_name(tmp_path: Path) -> None:
    network = IResNet(DEPTHS[18], 8, (2, 2, 2, 2, 2))
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    assert load_recognizer([tmp_path / "w.safetensors"]).family == "iresnet-18"


def test_all_that_is_wrong_with_a_state_dict_is_named(tmp_path: Path) -> None:
    state = dict(_small("mobilefacenet").state_dict())
    state["surprise"] = state.pop("conv_6_dw.bn.bias")
    state["conv_34.project.bn.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(OptionError) as caught:
        load_recognizer([tmp_path / "w.safetensors"])
    message = str(caught.value)
    for part in (
        *("ir-se50 (0%", "iresnet (", "inception-resnet-v1 (0%", "mobilefacenet is the closest"),
        *("missing conv_6_dw.bn.bias", "unexpected surprise"),
        "conv_34.project.bn.weight: received [3], expected [6]",
    ):
        assert part in message


@pytest.mark.parametrize("name", ["net.torchscript.pt", "net.pt", "net.pth"])
def test_programs_are_refused(name: str, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/code/__torch__.py", b"")
        archive.writestr("net/constants.pkl", b"")
    with pytest.raises(OptionError, match=r"TorchScript.*convert it to ONNX"):
        load_recognizer([tmp_path / name])


def test_all_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        load_recognizer([tmp_path / "a.pt"], input_format="gray", weights=[1, 2])
    assert "'gray', expected auto or one of rgb-unit" in str(caught.value)
    assert "2 weights for 1 recognizers" in str(caught.value)
    with pytest.raises(OptionError) as caught:
        load_recognizer([tmp_path / "a.pt", tmp_path / "b.onnx"])
    assert "a.pt' is not a file" in str(caught.value)
    assert "b.onnx' is not a file" in str(caught.value)


class _Means(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("input_format", "expected"),
    [
        ("rgb-unit", [-1.0, 0.0, 0.6]),
        ("rgb-255", [0.0, 127.5, 204.0]),
        ("bgr-unit", [0.6, 0.0, -1.0]),
        ("bgr-255", [204.0, 127.5, 0.0]),
    ],
)
def test_networks_get_the_channels_and_values_they_expect(
    input_format: str, expected: list[float]
) -> None:
    face = torch.tensor([-1.0, 0.0, 0.6])[None, :, None, None].expand(2, 3, 112, 112)
    module = FacePreprocessing(_Means(), 160, input_format)  # type: ignore[arg-type]
    torch.testing.assert_close(module(face), normalize(torch.tensor([expected] * 2), dim=1))


def _onnx(folder: Path, prelude: str, **constants: float) -> Path:
    body = f"{prelude} c = Conv<strides=[8, 8]>(h, w) p = PRelu(c, s) y = Flatten(p)"
    text = f"g (float[1, 3, 112, 112] x) => (float[1, E] y) {{ {body} }}"
    graph = parser.parse_graph(text)
    generator = torch.Generator().manual_seed(3)
    arrays = {"w": torch.randn(4, 3, 7, 7, generator=generator), "s": torch.full((4, 1, 1), 0.2)}
    arrays |= {name: torch.tensor(value) for name, value in constants.items()}
    graph.initializer.extend(numpy_helper.from_array(a.numpy(), n) for n, a in arrays.items())
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8)
    onnx.save(model, folder / "net.onnx")
    return folder / "net.onnx"


@pytest.mark.parametrize(
    ("prelude", "constants", "expected"),
    [
        ("h = Identity(x)", {}, "rgb-unit"),
        ("d = Sub(x, m) h = Mul(d, k)", {"m": 127.5, "k": 1 / 128}, "rgb-255"),
        ("h = Div(x, m)", {"m": 255.0}, "rgb-255"),
    ],
)
def test_what_an_onnx_file_expects_is_told_from_its_first_nodes(
    prelude: str, constants: dict[str, float], expected: str, tmp_path: Path
) -> None:
    file = _onnx(tmp_path, prelude, **constants)
    loaded = load_recognizer([file])
    assert loaded.provenance["recognizer_input"] == expected
    faces = _faces(1)
    pixels = faces if expected == "rgb-unit" else faces * 127.5 + 127.5
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x": pixels.numpy()})
    expected_embedding = normalize(torch.from_numpy(output), dim=1)
    torch.testing.assert_close(loaded.module(faces), expected_embedding, rtol=1e-4, atol=1e-5)
    chosen = load_recognizer([file], input_format="bgr-255").provenance
    assert chosen["recognizer_input"] == "bgr-255"


def test_unclear_arithmetic_asks_for_the_format(tmp_path: Path) -> None:
    file = _onnx(tmp_path, "d = Sub(x, m) h = Div(d, m)", m=0.5)
    with pytest.raises(OptionError, match=r"turns 0…255 into -1…509, .* say which"):
        load_recognizer([file])
    assert load_recognizer([file], input_format="rgb-unit").embedding_width == 4 * 14 * 14


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.0]])
def test_an_ensembles_cosine_is_the_mean_of_its_members(weights: list[float] | None) -> None:
    members = [_small(n) for n in ("ir-se50", "iresnet", "mobilefacenet")]
    ensemble = RecognizerEnsemble(members, weights).eval()
    faces = _faces()
    joined = ensemble(faces)
    torch.testing.assert_close(joined.norm(dim=1), torch.ones(3))
    cosines = torch.stack([m(faces) @ m(faces).T for m in members])
    shares = torch.tensor(weights or [1.0] * 3)
    expected = (cosines * (shares / shares.sum())[:, None, None]).sum(0)
    torch.testing.assert_close(joined @ joined.T, expected)


def test_ensembles_refuse_weights_that_mean_nothing() -> None:
    for weights in ([1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0], [1.0]):
        with pytest.raises(OptionError):
            RecognizerEnsemble([nn.Identity(), nn.Identity()], weights)


def test_several_files_become_an_ensemble(tmp_path: Path) -> None:
    save_file(_small("iresnet").state_dict(), tmp_path / "a.safetensors")
    torch.save(_small("mobilefacenet").state_dict(), tmp_path / "b.pth")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.pth"]
    loaded = load_recognizer(paths, weights=[1, 3])
    assert (loaded.family, loaded.embedding_width) == ("iresnet + mobilefacenet", 20)
    assert loaded.provenance["recognizer_2_file"] == "b.pth"
    assert loaded.provenance["recognizer_2_weight"] == "3"
    first, second = (load_recognizer([p]).module(_faces()) for p in paths)
    joined = torch.cat([first / 2, second * 0.75**0.5], 1)
    torch.testing.assert_close(loaded.module(_faces()), joined)


def _components(recognizer: nn.Module, width: int) -> Components:
    components = tiny_components()
    dimensions = replace(components.dimensions, embedding_width=width)
    cropped = CroppedRecognizer(recognizer, dimensions.image_size)
    return replace(components, recognizer=cropped, dimensions=dimensions)


SPEC, BATCH_AXES = PROGRAMS["guide"], ((0,), (0,), (0,), (0,), (0, 1))


@pytest.mark.parametrize("name", SMALL)
def test_guidance_traces_through_every_family(name: str) -> None:
    side = 160 if name == "inception-resnet-v1" else 112
    guide = wrap(_components(FacePreprocessing(_small(name), side), _width(name)), "guide")
    generator = torch.Generator().manual_seed(5)
    dimensions = replace(tiny_components().dimensions, embedding_width=_width(name))
    example = random_inputs(SPEC, dimensions, 2, generator)
    traced = trace_gradient(guide, example, BATCH_AXES)
    assert not [n for n in traced.graph.nodes if "backward" in str(n.target)]
    inputs = random_inputs(SPEC, dimensions, 3, generator)
    expected = guide(*inputs)
    assert expected[0].abs().max() > 0
    for ours, theirs in zip(traced(*inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def _width(name: str) -> int:
    return 12 if name == "inception-resnet-v1" else 10


def test_guidance_through_an_ensemble_as_onnx(tmp_path: Path) -> None:
    """All families and an imported graph at once, against autograd."""
    names = ("iresnet", "inception-resnet-v1", "mobilefacenet")
    for name in names:
        save_file(_small(name).state_dict(), tmp_path / f"{name}.safetensors")
    imported = _onnx(tmp_path, "d = Sub(x, m) h = Mul(d, m)", m=1.0)
    files = [*(tmp_path / f"{name}.safetensors" for name in names), imported]
    loaded = load_recognizer(files, input_format="rgb-unit")
    components = _components(loaded.module, loaded.embedding_width)
    generator = torch.Generator().manual_seed(6)
    guide = wrap(components, "guide")
    example = random_inputs(SPEC, components.dimensions, 2, generator)
    ir.save(lower(trace_gradient(guide, example, BATCH_AXES), SPEC, example), tmp_path / "g.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"]
    )
    for batch in (1, 3):
        inputs = random_inputs(SPEC, components.dimensions, batch, generator)
        feed = {t.name: x.numpy() for t, x in zip(SPEC.inputs, inputs, strict=True)}
        assert_close_to_reference(guide, inputs, session.run(None, feed))
