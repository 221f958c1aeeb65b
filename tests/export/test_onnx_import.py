"""Imported ONNX graphs against ONNX Runtime: outputs, gradients, batches, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser
from torch import nn

from diffveil.errors import OptionError
from diffveil_export.gradient import trace_gradient
from diffveil_export.models.recognizers.onnx_import import OPERATORS, load_onnx, parse
from parity import assert_close_to_reference

Arrays = Mapping[str, NDArray[Any]]


def _array(*shape: int, positive: bool = False) -> NDArray[np.float32]:
    values = np.random.default_rng(len(shape) + sum(shape)).normal(size=shape)
    return (np.abs(values) + 0.5 if positive else values).astype(np.float32)


def _whole(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _model(
    body: str, arrays: Arrays, opset: int = 17, batch: str = "N", output: str = "float[N, E] y"
) -> onnx.ModelProto:
    """A model of 3×8×8 images; `body` ends in `y`."""
    graph = parser.parse_graph(f"g (float[{batch}, 3, 8, 8] x) => ({output}) {{ {body} }}")
    graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    for i, node in enumerate(graph.node):
        node.name = f"n{i}"
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _save(folder: Path, *args: Any, **kwargs: Any) -> Path:
    file = folder / "model.onnx"
    onnx.save(_model(*args, **kwargs), file)
    return file


def _run(file: Path, x: torch.Tensor) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": x.numpy()})[0]
    return result


W, B4 = {"w": _array(4, 3, 3, 3), "b": _array(4)}, _array(4)
POOL = "h = {}<kernel_shape=[3, 3], strides=[2, 2], {}>(x)"
STATISTICS = {
    "s": _array(3),
    "b": _array(3, 1)[:, 0],
    "m": _array(3),
    "v": _array(3, positive=True),
}
RISE = "p = Mul(x, x) q = Add(p, half)"
HALF = {"half": np.array(0.5, np.float32)}

# Each ends in h, which is flattened to y.
CASES: dict[str, tuple[str, Arrays, int]] = {
    "conv": ("h = Conv<pads=[1, 0, 2, 1], strides=[2, 2]>(x, w, b)", W, 17),
    "conv dilated": ("h = Conv<dilations=[2, 1], pads=[1, 1, 1, 1]>(x, w)", {"w": W["w"]}, 11),
    "conv depthwise": ("h = Conv<group=3>(x, w)", {"w": _array(3, 1, 3, 3)}, 17),
    "conv same upper": ('h = Conv<auto_pad="SAME_UPPER", strides=[3, 2]>(x, w, b)', W, 17),
    "conv same lower": ('h = Conv<auto_pad="SAME_LOWER", strides=[3, 2]>(x, w, b)', W, 17),
    "batch norm": ("h = BatchNormalization<epsilon=0.01>(x, s, b, m, v)", STATISTICS, 11),
    "instance norm": ("h = InstanceNormalization(x, s, b)", STATISTICS, 17),
    "layer norm": ("h = LayerNormalization<axis=2>(x, s)", {"s": _array(8, 8)}, 17),
    "prelu of channels": ("h = PRelu(x, s)", {"s": _array(3, 1, 1)}, 11),
    "prelu of all": ("h = PRelu(x, s)", {"s": _array(1)}, 17),
    "prelu of columns": ("h = PRelu(x, s)", {"s": _array(8)}, 17),
    "prelu of vectors": ("f = Flatten(x) h = PRelu(f, s)", {"s": _array(192)}, 17),
    "activations": (
        "a = Relu(x) b = LeakyRelu<alpha=0.2>(x) c = Sigmoid(x) d = Tanh(x) e = HardSwish(x)"
        " f = HardSigmoid<alpha=0.3>(x) g = Elu(x) i = Softplus(x) h = Sum(a, b, c, d, e, f, g, i)",
        {},
        17,
    ),
    "clip by inputs": ("h = Clip(x, low)", {"low": np.array(-0.3, np.float32)}, 17),
    "clip by attributes": ("h = Clip<min=-0.5, max=0.25>(x)", {}, 10),
    "arithmetic": (
        f"{RISE} r = Sqrt(q) s = Sub(x, half) d = Div(s, r) n = Neg(d) m = Max(n, x) a = Abs(x)"
        " c = Constant<value_float=0.3>() h = Min(m, a, c)",
        HALF,
        17,
    ),
    "powers": (
        f"{RISE} a = Pow(q, half) l = Log(q) e = Exp(x) t = Add(a, l) h = Mul(t, e)",
        HALF,
        17,
    ),
    "gemm": (
        "f = Flatten(x) h = Gemm<alpha=0.5, beta=2.0, transB=1>(f, w, b)",
        {"w": _array(7, 192), "b": _array(7)},
        17,
    ),
    "matmul": ("h = MatMul(x, w)", {"w": _array(8, 5)}, 17),
    "reshape": (
        "r = Reshape(x, s) h = MatMul(r, w)",
        {"s": _whole(0, 3, -1), "w": _array(64, 5)},
        17,
    ),
    "transpose": ("h = Transpose<perm=[0, 2, 3, 1]>(x)", {}, 17),
    "concat": ("a = Relu(x) h = Concat<axis=1>(x, a, x)", {}, 17),
    "split by sizes": (
        "a, b = Split<axis=1>(x, s) h = Concat<axis=1>(b, a)",
        {"s": _whole(1, 2)},
        17,
    ),
    "split by attribute": (
        "a, b = Split<axis=2, split=[3, 5]>(x) h = Concat<axis=2>(b, a)",
        {},
        11,
    ),
    "split evenly": ("a, b = Split<axis=3>(x) h = Sub(b, a)", {}, 17),
    "slice": (
        "h = Slice(x, s, e, a, t)",
        {"s": _whole(1, -1), "e": _whole(-1, -100), "a": _whole(2, 3), "t": _whole(1, -3)},
        17,
    ),
    "slice by attributes": ("h = Slice<axes=[1, 3], starts=[0, 2], ends=[9999, 5]>(x)", {}, 9),
    "channels reversed": (
        "h = Slice(x, s, e, a, t)",
        {"s": _whole(-1), "e": _whole(-(2**62)), "a": _whole(1), "t": _whole(-1)},
        17,
    ),
    "gather": ("h = Gather<axis=1>(x, i)", {"i": _whole(2, 0, 1, 1)}, 17),
    "gather one": ("h = Gather<axis=2>(x, i)", {"i": np.array(-2)}, 17),
    "gather many": (
        "f = Flatten(x) h = Gather<axis=1>(f, i)",
        {"i": _whole(*range(0, 40, 2)).reshape(4, 5)},
        17,
    ),
    "unsqueeze": ("u = Unsqueeze(x, a) h = Squeeze(u, a)", {"a": _whole(2)}, 17),
    "squeeze by attributes": ("u = Unsqueeze<axes=[1]>(x) h = Squeeze<axes=[1]>(u)", {}, 11),
    "global average": ("h = GlobalAveragePool(x)", {}, 17),
    "global maximum": ("h = GlobalMaxPool(x)", {}, 17),
    "average pool": (POOL.format("AveragePool", "pads=[1, 1, 1, 1]"), {}, 17),
    "average pool uneven": (POOL.format("AveragePool", "pads=[0, 1, 1, 0]"), {}, 17),
    "average pool, pads counted": (
        POOL.format("AveragePool", "pads=[0, 1, 1, 0], count_include_pad=1"),
        {},
        17,
    ),
    "max pool": (POOL.format("MaxPool", "ceil_mode=1"), {}, 17),
    "max pool uneven": (POOL.format("MaxPool", "pads=[0, 1, 1, 0]"), {}, 17),
    "reduce": (
        "m = ReduceMean<axes=[2]>(x) s = ReduceSum(x, a) t = Add(m, s) h = ReduceL2<axes=[-1]>(t)",
        {"a": _whole(2)},
        17,
    ),
    "normalize": ("f = Flatten(x) h = LpNormalization<axis=1, p=2>(f)", {}, 17),
    "softmax": ("h = Softmax<axis=1>(x)", {}, 13),
    "softmax of old": ("h = Softmax<axis=2>(x)", {}, 11),
    "pad": (
        "h = Pad(x, p, c)",
        {"p": _whole(0, 0, 1, 2, 0, 0, 0, 3), "c": np.array(2, np.float32)},
        17,
    ),
    "upsample": (
        'h = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", '
        'nearest_mode="floor">(x, , f)',
        {"f": np.array([1, 1, 2, 3], np.float32)},
        17,
    ),
    "dropout": ("d = Dropout(x) h = Identity(d)", {}, 17),
    "gelu": ("e = Erf(x) g = Gelu(x) h = Mul(g, e)", {}, 20),
    "shapes": (
        "s = Shape(x) n = Gather(s, i) o = Unsqueeze(n, i2) c = Cast<to=7>(m)"
        " k = Concat<axis=0>(o, c) r = Reshape(x, k)"
        " l = ReduceL2<axes=[1], keepdims=1>(r) t = Shape(r) w = Expand(l, t)"
        " h = Div(r, w)",
        {"i": np.array(0), "i2": _whole(0), "m": np.array([-1.0], np.float32)},
        17,
    ),
    "constants folded": (
        "a = Unsqueeze(w, i) k = Reciprocal(a) c = ConstantOfShape<value=float[1] {2.0}>(n)"
        " q = Mul(k, c) h = PRelu(x, q)",
        {"w": _array(3, positive=True), "i": _whole(1, 2), "n": _whole(3, 1, 1)},
        17,
    ),
}


class _Gradient(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.network(x).square().sum(), x)
        return gradient


@pytest.mark.parametrize("case", CASES)
def test_operators_agree_with_onnx_runtime_and_have_gradients(case: str, tmp_path: Path) -> None:
    body, arrays, opset = CASES[case]
    file = _save(tmp_path, body + " y = Flatten(h)", arrays, opset)
    module, _ = load_onnx(file)
    generator = torch.Generator().manual_seed(4)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 8, 8, generator=generator)
        assert_close_to_reference(module, [x], [_run(file, x)])

    gradient = _Gradient(module.double())
    x = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    direction, step = torch.randn(x.shape, generator=generator, dtype=torch.float64), 1e-6
    ahead, behind = (module(x + s * direction).square().sum() for s in (step, -step))
    slope = (gradient(x) * direction).sum()
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
    traced = trace_gradient(gradient, (x[:2],), ((0,),))
    assert not [n for n in traced.graph.nodes if "backward" in str(n.target)]
    torch.testing.assert_close(traced(x), gradient(x), rtol=1e-9, atol=1e-9)


def test_every_operator_is_tried() -> None:
    texts = " ".join(body + " y = Flatten(h)" for body, _, _ in CASES.values())
    tried = {name for name in OPERATORS if f" {name}(" in texts or f" {name}<" in texts}
    assert set(OPERATORS) == tried


@pytest.mark.parametrize("shape", [(1, -1), (1, 192), (0, -1), (1, 3, 64)])
def test_a_graph_for_one_image_takes_any_batch(shape: Sequence[int], tmp_path: Path) -> None:
    body = "c = Relu(x) h = Reshape(c, s) y = Flatten(h)"
    file = _save(tmp_path, body, {"s": _whole(*shape)}, batch="1", output="float[1, E] y")
    module, _ = load_onnx(file)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = np.concatenate([_run(file, image[None]) for image in x])
    np.testing.assert_allclose(module(x).numpy(), expected, rtol=1e-6)


def test_a_leading_one_that_is_not_the_batch_stays(tmp_path: Path) -> None:
    """[1, 3] of a constant is a row that is added to every image, not a batch."""
    arrays = {"s": _whole(1, 3), "w": _array(3)}
    file = _save(
        tmp_path, "g = GlobalAveragePool(x) f = Flatten(g) r = Reshape(w, s) y = Add(f, r)", arrays
    )
    module, _ = load_onnx(file)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert_close_to_reference(module, [x], [_run(file, x)])


def test_half_precision_and_data_beside_the_file(tmp_path: Path) -> None:
    body = "h = Cast<to=1>(w) c = Conv(x, h) y = Flatten(c)"
    model = _model(body, {"w": _array(4, 3, 3, 3).astype(np.float16)})
    file = tmp_path / "model.onnx"
    onnx.save(model, file, save_as_external_data=True, location="model.data", size_threshold=0)
    assert (tmp_path / "model.data").is_file()
    module, graph = load_onnx(file)
    assert graph.constants["w"].dtype == np.float32
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert_close_to_reference(module, [x], [_run(file, x)])


def _outside(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.data")


def _too_few_bytes(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 10**9


def _enormous(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.dims[0] = 2**40
    tensor.ClearField("raw_data")


CONV = "c = Conv(x, w) y = Flatten(c)"
DAMAGE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "outside": (_outside, "external data 'secret.data' is not a file in the model's folder"),
    "too few bytes": (_too_few_bytes, "tensor 'w': 432 bytes, expected 108000000000"),
    "enormous": (_enormous, "expected at most 2147483648"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_tensors_are_checked_before_they_are_read(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    (tmp_path / "secret.data").write_bytes(bytes(432))
    model = _model(CONV, {"w": W["w"]})
    damage(model)
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(OptionError) as caught:
        load_onnx(folder / "model.onnx")
    assert message in str(caught.value)


REFUSED: dict[str, tuple[str, Arrays, str]] = {
    "mixed": ("m = ReduceMean<axes=[0]>(x) a = Sub(x, m) y = Flatten(a)", {}, "mixes the images"),
    "no vector": ("y = Relu(x)", {}, "expected one vector an image"),
    "not the image's": ("y = Relu(w)", {"w": _array(1, 5)}, "does not depend on the image"),
    "rounds": ("i = Cast<to=7>(x) f = Cast<to=1>(i) y = Flatten(f)", {}, "Cast 'n0': rounds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str, tmp_path: Path) -> None:
    body, arrays, message = REFUSED[name]
    output = "float[N, 3, 8, 8] y" if name == "no vector" else "float[N, E] y"
    with pytest.raises(OptionError) as caught:
        load_onnx(_save(tmp_path, body, arrays, output=output))
    assert message in str(caught.value)


def test_what_is_not_needed_is_not_looked_at(tmp_path: Path) -> None:
    """A node that rounds, but not on the way to the first output."""
    module, _ = load_onnx(_save(tmp_path, "i = Cast<to=7>(x) y = Flatten(x)", {}))
    assert module.embedding_width == 192


def test_all_unsupported_operators_are_named_at_once(tmp_path: Path) -> None:
    body = "a = Round(x) b = Sign(a) c = Round(b) y = Flatten(c)"
    with pytest.raises(OptionError) as caught:
        load_onnx(_save(tmp_path, body, {}))
    assert "Round in 'n0', 'n2'; Sign in 'n1'" in str(caught.value)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\x00 not a model")
    with pytest.raises(OptionError, match=r"not an ONNX model|not a valid ONNX model"):
        load_onnx(file)
    _save(tmp_path, CONV, {"w": W["w"]})
    monkeypatch.setattr(parse, "MAX_BYTES", 100)
    with pytest.raises(OptionError, match="expected at most 100"):
        load_onnx(file)
