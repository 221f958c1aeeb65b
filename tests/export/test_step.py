"""Fusing `step` from a bundle's programs, and running it in ONNX Runtime's own buffers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from tests.export.test_distill import student_for

from diffveil.bundle import Bundle
from diffveil.cli.main import main
from diffveil.engines import Loop, ONNXRuntimeCPU, Programs
from diffveil.engines.bound import BoundLoop
from diffveil.errors import EngineError, OptionError
from diffveil.golden import check_backend
from diffveil.guidance import IdentityGuidance
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.parity import describe
from diffveil.plans import Guidance, Plan
from diffveil.programs import ALL_PROGRAMS, PROGRAMS
from diffveil.samplers import SamplerTable, Step
from diffveil.sampling import run
from diffveil_export import fuse_cli
from diffveil_export import step as module
from diffveil_export.assembly import Assembly
from diffveil_export.engines.builder import BuildOptions, build_engines
from diffveil_export.engines.trt_api import load_builder
from diffveil_export.latent_guide import add_latent_guide
from diffveil_export.step import Predict, Update, fuse_step
from diffveil_export.verify import ParityError, random_inputs
from fake_programs import FakeBackend, fake_programs

F32 = NDArray[np.float32]
_GUIDANCE = Guidance(
    weight=((-1, 0.3),), normalise="rms", scale_with_noise=True, margin=-0.2, mode="repel"
)
ANONYMIZE = Plan("dpm++2m", 5, 0.8, 400, 300, _GUIDANCE)
HIDE = replace(
    ANONYMIZE, guidance=replace(_GUIDANCE, mode="attract", margin=1.0), conditional_above=600
)


@pytest.fixture(scope="module")
def fused(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fuse_step(tiny_bundle, tmp_path_factory.mktemp("fused") / "bundle")


@pytest.fixture(scope="module")
def cheap(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With the recognizer on latents, and a step made of it."""
    folder = tmp_path_factory.mktemp("cheap")
    guided = add_latent_guide(tiny_bundle, student_for(tiny_bundle), folder / "guided")
    return fuse_step(guided, folder / "bundle")


@pytest.fixture(scope="module")
def crops() -> F32:
    return np.random.default_rng(3).uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)


class Recording(Programs):
    """Programs that count their loops, and may be kept from `step`."""

    def __init__(self, bundle: Bundle, fused: bool = True) -> None:
        super().__init__(bundle, ONNXRuntimeCPU(threads=1))
        self.loops, self._fused = 0, fused

    def can(self, program: str) -> bool:
        return super().can(program) and (self._fused or program != "step")

    def step_loop(self, rows: int) -> Loop:
        self.loops += 1
        return super().step_loop(rows)


@pytest.fixture(scope="module")
def both(fused: Bundle) -> tuple[Recording, Recording]:
    """With `step`, and without."""
    return Recording(fused), Recording(fused, fused=False)


def protect(programs: Recording, crops: F32, plan: Plan, variants: int, **options: Any) -> F32:
    operations = FaceOperations(programs, **options)
    act = operations.anonymize if plan.guidance.mode == "repel" else operations.hide
    keys = [NoiseKey.from_seed(face) for face in range(len(crops))]
    return act(crops, plan, keys=keys, variants=variants)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m", "lcm"])
@pytest.mark.parametrize("plan", [ANONYMIZE, HIDE], ids=["anonymize", "hide"])
def test_it_protects_as_the_programs_do_one_by_one(
    both: tuple[Recording, Recording],
    crops: F32,
    plan: Plan,
    sampler: Literal["ddim", "dpm++2m", "lcm"],
) -> None:
    fused, separate = both
    plan = replace(plan, sampler=sampler)
    before = fused.loops
    for faces, variants in ((1, 1), (3, 1), (1, 2), (3, 2)):
        ours = protect(fused, crops[:faces], plan, variants)
        theirs = protect(separate, crops[:faces], plan, variants)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert fused.loops == before + 4
    assert separate.loops == 0
    # The comparison would not notice guidance that does nothing.
    unguided = replace(plan, guidance=replace(plan.guidance, weight=((-1, 0.0),)))
    assert np.abs(protect(fused, crops, unguided, 2) - ours).max() > 0.01
    assert fused.loops == before + 4


def test_it_takes_the_cheap_gradient_where_that_was_there(
    cheap: Bundle, fused: Bundle, crops: F32
) -> None:
    assert cheap.program("step").parts == ("denoise", "guide_latent")
    assert fused.program("step").parts == ("denoise", "guide")
    assert "guide_latent" in cheap.manifest.provenance["step"]
    latent = replace(ANONYMIZE, guidance=replace(_GUIDANCE, through="latent"))
    with Recording(cheap) as programs, Recording(cheap, fused=False) as separate:
        ours = protect(programs, crops, latent, 2)
        assert programs.loops == 1
        np.testing.assert_allclose(ours, protect(separate, crops, latent, 2), rtol=0, atol=1e-4)
        twice = replace(latent, guidance=replace(latent.guidance, repeats=2))
        for other in (ANONYMIZE, twice):
            protect(programs, crops[:1], other, 1)
        assert programs.loops == 1


def test_batches_are_bounded(both: tuple[Recording, Recording], crops: F32) -> None:
    whole = protect(both[0], crops, ANONYMIZE, 2)
    parts = protect(both[0], crops, ANONYMIZE, 2, max_batch=2)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("normalise", ["rms", "none"])
@pytest.mark.parametrize("mode", ["repel", "attract"])
@pytest.mark.parametrize("margin", [None, -0.3, 0.0, 0.3])
@pytest.mark.parametrize("variants", [1, 2, 3])
def test_one_step_is_the_loops(
    tmp_path: Path,
    rng: np.random.Generator,
    normalise: Literal["rms", "none"],
    mode: Literal["repel", "attract"],
    margin: float | None,
    variants: int,
) -> None:
    """What follows the guide, on scripted answers of it: margins, families, sizes, sums, blend."""
    rows, shape = 6, (6, 8, 4, 4)
    x, epsilon, noise, background, gradient = (
        rng.standard_normal(shape).astype(np.float32) for _ in range(5)
    )
    gradient[0] *= 1e-14  # vanishes
    mask = rng.uniform(0, 1, (rows, 1, 4, 4)).astype(np.float32)
    embedding, identities = (
        (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)
        for v in (rng.standard_normal((rows, 7)), rng.standard_normal((rows // variants, 7)))
    )
    programs = fake_programs(tmp_path)
    assert isinstance(programs.backend, FakeBackend)
    asked: dict[str, Any] = {}

    def answer(**inputs: Any) -> dict[str, Any]:
        asked.update(inputs)
        return {"gradient": gradient, "energy": np.zeros(rows), "embedding": embedding}

    programs.backend.overrides["guide"] = answer
    guidance = IdentityGuidance(
        programs,
        Guidance(weight=((-1, 1.0),), normalise=normalise, margin=margin, mode=mode),
        identities,
        variants=variants,
    )
    step = Step(500, 400, 0.9, 0.0, -0.4, 0.0, 0.2, 0.7, 1.1, -0.6)
    expected, _ = run(
        SamplerTable("one", 500, (step,)),
        x,
        lambda *_: epsilon,
        gradient=guidance,
        noise=lambda _: noise,
        blend=lambda x, _: background + mask * (x - background),
    )
    question = guidance.question(np.arange(rows))
    values = {
        **{"latent": x, "previous": x, "epsilon": epsilon, "previous_epsilon": 0 * x},
        **{"noise": noise, "gradient": gradient, "embedding": embedding, **question},
        **{"background": background, "mask": mask},
        "coefficients": np.tile(np.array(step.coefficients, np.float32), (rows, 1)),
        "release": np.full(rows, guidance.release, np.float32),
        "normalise": np.full(rows, guidance.normalise, np.float32),
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in values.items()}
    following, pushed = Update()(**tensors)
    np.testing.assert_allclose(following, expected, rtol=1e-5, atol=1e-5)
    x0 = Predict()(*(tensors[name] for name in ("latent", "epsilon", "coefficients")))
    np.testing.assert_allclose(x0, asked["x0"], rtol=1e-5, atol=1e-5)
    if margin is None:
        assert pushed.all()
    elif variants == 1:
        assert 0 < pushed.sum() < rows


def test_keys_stay_valid_and_weights_are_shared(tiny_bundle: Bundle, fused: Bundle) -> None:
    assert fused.fingerprint == tiny_bundle.fingerprint
    assert set(fused.manifest.programs) == {*PROGRAMS, "step"}
    for name, entry in tiny_bundle.manifest.programs.items():
        assert fused.program(name).file == entry.file
    assert set(fused.manifest.files) == set(tiny_bundle.manifest.files)
    entry = fused.program("step")
    assert entry.data == ("weights.bin",)
    assert {row.output for row in entry.parity} == {t.name for t in ALL_PROGRAMS["step"].outputs}
    parts = [tiny_bundle.program(part).cost for part in entry.parts]
    assert entry.cost is not None
    assert entry.cost.flops > sum(cost.flops for cost in parts if cost)
    assert describe(check_backend(fused, ONNXRuntimeCPU(threads=1))) == ""


def test_a_new_guide_drops_the_step_that_holds_the_old(cheap: Bundle, tmp_path: Path) -> None:
    other = add_latent_guide(cheap, student_for(cheap, seed=1), tmp_path / "other")
    assert "step" not in other.manifest.programs
    assert "step" not in other.manifest.provenance
    assert not (other.path / "step.onnx").exists()
    again = fuse_step(other, other.path, force=True)
    assert again.fingerprint == cheap.fingerprint


def test_fusing_twice_gives_the_same_bytes(fused: Bundle, tmp_path: Path) -> None:
    again = fuse_step(fused, tmp_path / "again")
    assert again.program("step").file == fused.program("step").file


def test_what_differs_from_its_parts_is_refused(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Update):
        def forward(self, *inputs: torch.Tensor) -> Any:
            following, pushed = super().forward(*inputs)
            return 1.01 * following, pushed

    graphs = module.StepGraphs(tiny_bundle)
    monkeypatch.setattr(module, "StepGraphs", lambda _: graphs)
    monkeypatch.setattr(module, "Update", Wrong)
    with pytest.raises(ParityError, match=r"step\.next"):
        fuse_step(tiny_bundle, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_parts_that_do_not_fit_are_not_joined(tiny_bundle: Bundle) -> None:
    whole = Assembly(tiny_bundle.dimensions)
    spec = ALL_PROGRAMS["denoise"]
    inputs = {t.name: whole.input(t) for t in spec.inputs}
    path = tiny_bundle.path / "denoise.onnx"
    with pytest.raises(OptionError, match="nothing is given for timestep"):
        whole.add("denoise", ir.load(path), {n: v for n, v in inputs.items() if n != "timestep"})
    whole.add("denoise", ir.load(path), inputs)
    newer = ir.load(path)
    newer.graph.opset_imports[""] = 22
    with pytest.raises(OptionError, match=r"version 22 of operator set 'ai\.onnx'"):
        whole.add("denoise", newer, inputs)


def test_a_part_added_again_shares_its_weights(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Denoising what was denoised: two calls in one graph, weights and their unpacking once."""
    shutil.copyfile(tiny_bundle.path / "weights.bin", tmp_path / "weights.bin")
    spec = ALL_PROGRAMS["denoise"]
    whole = Assembly(tiny_bundle.dimensions)
    given = {t.name: whole.input(t) for t in spec.inputs}
    counts = []
    epsilon = given["latent"]
    for _ in range(2):
        part = ir.load(tiny_bundle.path / "denoise.onnx")
        epsilon = whole.add("denoise", part, {**given, "latent": epsilon})["epsilon"]
        counts.append(len(whole._initializers))
    model = whole.model([(spec.outputs[0], epsilon)])
    assert counts[0] == counts[1]
    unpacking = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(unpacking) == len({node.inputs[0].name for node in unpacking if node.inputs[0]})
    ir.save(model, tmp_path / "twice.onnx")

    import onnxruntime

    generator = torch.Generator().manual_seed(1)
    inputs = random_inputs(spec, tiny_bundle.dimensions, 2, generator)
    feed = {t.name: x.numpy() for t, x in zip(spec.inputs, inputs, strict=True)}
    (twice,) = onnxruntime.InferenceSession(tmp_path / "twice.onnx").run(None, feed)
    with Programs(tiny_bundle, ONNXRuntimeCPU(threads=1)) as programs:
        once = programs.denoise(**feed)
        expected = programs.denoise(**{**feed, "latent": once})
    np.testing.assert_allclose(twice, expected, rtol=0, atol=1e-4)


def test_a_bound_loop_is_fed_strictly_and_gives_copies(fused: Bundle) -> None:
    with Programs(fused, ONNXRuntimeCPU(threads=1)) as programs:
        loop = programs.step_loop(2)
        assert isinstance(loop, BoundLoop)
        with pytest.raises(EngineError, match="lacks"):
            loop.step()
        with pytest.raises(EngineError, match=r"photo: not an input; latent: received float64"):
            loop.put(photo=np.zeros(1), latent=np.zeros((2, 8, 4, 4)))
        with pytest.raises(EngineError, match="no output"):
            loop.get("next")
        spec = ALL_PROGRAMS["step"]
        inputs = random_inputs(spec, fused.dimensions, 2, torch.Generator().manual_seed(2))
        feed = {t.name: x.numpy() for t, x in zip(spec.inputs, inputs, strict=True)}
        engine = programs.engine("step")
        loop.put(**feed)
        # Three calls: every buffer of a ring has been in every place.
        for _ in range(3):
            expected = engine.run(**feed)
            loop.step()
            kept = {name: loop.get(name) for name in expected}
            for name, value in expected.items():
                np.testing.assert_allclose(kept[name], value, rtol=1e-5, atol=1e-5)
            feed |= {"previous": feed["latent"], "latent": expected["next"]}
            feed["previous_epsilon"] = expected["epsilon"]
        loop.step()
        np.testing.assert_allclose(kept["next"], expected["next"], rtol=1e-5, atol=1e-5)
    with pytest.raises(EngineError, match="closed"):
        engine.loop(2, ())  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.trt
def test_tensorrt_rtx_builds_it(fused: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = Bundle.load(shutil.copytree(fused.path, tmp_path / "bundle"))
    options = BuildOptions(targets=("89",), programs=("step",))
    (result,) = build_engines(bundle, load_builder("tensorrt-rtx"), options)
    assert result.status == "built"


def test_the_command(
    tiny_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "fused"
    words = ["fuse-step", str(tiny_bundle.path), "-o", str(target)]
    assert main(words) == 0
    assert "denoise and guide in one graph" in capsys.readouterr().out
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
    made = Bundle.load(target)
    given: dict[str, Any] = {}
    monkeypatch.setattr(fuse_cli, "fuse_step", lambda *_, **k: given.update(k) or made)
    assert main([*words, "--json", "--force"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert given == {"force": True}
    assert record["parts"] == ["denoise", "guide"]
    assert record["fingerprint"] == tiny_bundle.fingerprint
    assert record["parity"] < 1e-3
