"""Program `assess`: how a judge joins a bundle, and that it computes what PyTorch does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.errors import BundleError, OptionError
from diffveil.golden import check_backend
from diffveil_export.judge import add_judge
from diffveil_export.models.embedded import load_embedded
from diffveil_export.reference.judge import FaceJudge, GradeHeads
from diffveil_export.reference.recognizer import FaceRecognizer
from diffveil_export.verify import ParityError
from judged_bundles import digests, judge_for


@pytest.fixture(scope="module")
def judged(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("judged") / "bundle"
    return add_judge(tiny_bundle, judge_for(tiny_bundle), target, origin="nobody's grades")


def test_a_judge_joins_without_changing_anything_else(tiny_bundle: Bundle, judged: Bundle) -> None:
    assert judged.fingerprint == tiny_bundle.fingerprint
    before, after = digests(tiny_bundle.path), digests(judged.path)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"bundle.json", "golden.safetensors", "assess.onnx", "assess.bin"}
    assert judged.manifest.provenance["assess"] == "nobody's grades"
    assert judged.program("assess").cost is not None
    with pytest.raises(BundleError, match="no program 'assess'"):
        tiny_bundle.program("assess")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_it_computes_what_pytorch_does(
    tiny_bundle: Bundle, tmp_path: Path, batch: int, weights: str
) -> None:
    wide = FaceRecognizer(0, tiny_bundle.image_size, (32, 64, 128), (1, 1, 1), 5).eval().fuse()
    judge = judge_for(tiny_bundle, seed=batch, recognizer=wide if weights == "int4" else None)
    bundle = add_judge(tiny_bundle, judge, tmp_path / "bundle", weights=weights)  # type: ignore[arg-type]
    kinds = {v.dtype for v in ir.load(bundle.program_path("assess")).graph.initializers.values()}
    assert (ir.DataType.INT4 in kinds) == (weights == "int4")
    size = bundle.image_size
    image = np.random.default_rng(batch).uniform(-1, 1, (batch, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        expected = judge.double()(torch.from_numpy(image).double()).numpy()
    with Programs(bundle, ONNXRuntimeCPU()) as programs:
        found = programs.assess(image=image)
    assert found.shape == (batch,)
    assert ((found > 0) & (found < 1)).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert all(check_backend(bundle, ONNXRuntimeCPU(), programs=["assess"]))


def test_fusing_changes_nothing() -> None:
    torch.manual_seed(1)
    heads = GradeHeads([12, 16]).eval()
    features = [3 + 2 * torch.randn(5, 12, 14, 14), torch.randn(5, 16, 4, 4) - 1]
    heads.measure(features)
    with torch.no_grad():
        before = heads.opinions(features)
        torch.testing.assert_close(heads.fuse().opinions(features), before, rtol=1e-4, atol=1e-5)
    assert before.shape == (4, 5)


def test_it_sees_with_a_recognizers_eyes(tiny_bundle: Bundle, tmp_path: Path) -> None:
    recognizer = load_embedded(tiny_bundle).modules()["recognizer"]
    assert isinstance(recognizer, FaceRecognizer)
    judge = judge_for(tiny_bundle, recognizer=recognizer)
    image = torch.rand(2, 3, tiny_bundle.image_size, tiny_bundle.image_size)
    start, stop = recognizer.margin, recognizer.margin + recognizer.size
    with torch.no_grad():
        expected = recognizer.features(image[:, :, start:stop, start:stop])
        torch.testing.assert_close(judge.features(image)[1], expected)
    bundle = add_judge(tiny_bundle, judge, tmp_path / "bundle")
    assert set(bundle.program("assess").data) == {"weights.bin", "assess.bin"}
    stranger = add_judge(tiny_bundle, judge_for(tiny_bundle), tmp_path / "other")
    assert stranger.program("assess").data == ("assess.bin",)
    assert bundle.fingerprint == tiny_bundle.fingerprint
    heads = sum(p.numel() for p in judge.heads.parameters())
    assert (bundle.path / "assess.bin").stat().st_size < 1.5 * heads
    assert (bundle.path / "weights.bin").stat().st_size == (
        tiny_bundle.path / "weights.bin"
    ).stat().st_size
    assert all(check_backend(bundle, ONNXRuntimeCPU(), programs=["assess"]))


def test_four_bits_take_little_room(tiny_bundle: Bundle, tmp_path: Path) -> None:
    torch.manual_seed(0)
    recognizer = FaceRecognizer(0, tiny_bundle.image_size, (32, 64, 128), (1, 1, 1), 5).eval()
    judge = FaceJudge(recognizer.fuse()).fuse()
    size = sum(p.numel() for p in judge.parameters())
    bundle = add_judge(tiny_bundle, judge, tmp_path / "bundle", weights="int4")
    # A block of 32 takes 18 bytes; what is small or has an odd width keeps eight bits or sixteen.
    assert (bundle.path / "assess.bin").stat().st_size < 0.75 * size
    assert all(check_backend(bundle, ONNXRuntimeCPU(), programs=["assess"]))


def test_a_bundle_that_is_there_stays(tiny_bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    first = add_judge(tiny_bundle, judge_for(tiny_bundle), target)
    before = digests(target)
    with pytest.raises(OptionError, match="exists"):
        add_judge(first, judge_for(tiny_bundle, seed=2), target)
    assert digests(target) == before
    add_judge(first, judge_for(tiny_bundle, seed=2), target, force=True)
    assert digests(target)["assess.bin"] != before["assess.bin"]


def test_a_judge_that_computes_something_else_is_refused(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = judge_for(tiny_bundle)
    calls = 0
    original = FaceJudge.forward

    def drifting(self: FaceJudge, image: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(self, image) + (0.01 if calls > 3 else 0.0)

    monkeypatch.setattr(FaceJudge, "forward", drifting)
    with pytest.raises(ParityError, match="assess"):
        add_judge(tiny_bundle, judge, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
