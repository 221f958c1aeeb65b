"""Programs `predict`, `steer` and `advance`: how they join a bundle, and whole loops over them.

The loops run in ONNX Runtime's bound buffers on the CPU and on a fake device, and are held against
the loop in NumPy.
"""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffveil.bundle import Bundle
from diffveil.cli.main import main
from diffveil.engines import ONNXRuntimeCPU, Programs, Scheduled, TensorRT
from diffveil.errors import EngineError, OptionError
from diffveil.golden import check_backend
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.parity import describe
from diffveil.plans import Guidance, Inversion, Plan
from diffveil.presets import PRESETS
from diffveil.programs import LOOP_PROGRAMS, PROGRAMS
from diffveil.samplers import o_belm
from diffveil.schedule import NoiseSchedule
from diffveil_export import loop_programs
from diffveil_export.loop_programs import add_loop_programs
from diffveil_export.step_parts import Advance
from diffveil_export.verify import ParityError
from fake_cuda import FakeDriver
from fake_trt_runtime import TARGET, FakeTensorRT
from looping_cpu import LoopingCPU

F32 = NDArray[np.float32]
_PLAIN_HIDE = PRESETS["fast"].hide.fitting(has_few=False, has_surrogates=False)
_HIDE = replace(
    _PLAIN_HIDE, steps=6, guidance=replace(_PLAIN_HIDE.guidance, margin=None), redraws=0
)
_REPEL = Plan(
    *("lcm", 6, 0.8, 400, 300),
    Guidance(weight=((-1, 0.3),), normalise="rms", scale_with_noise=True, margin=-0.2),
)
_PAPER = Plan(
    *("ddim", 6, 0.9, 600, 0),
    Guidance(weight=((600, 1.5), (-1, 2.5)), mode="attract"),
    spacing="leading",
)
PLANS = {
    "hide takes two gradients": _HIDE,
    "three gradients": replace(_REPEL, guidance=replace(_REPEL.guidance, repeats=3, margin=0.0)),
    "anonymize": replace(_REPEL, fresh_noise=0.7),
    "published": _PAPER,
    "every other step": replace(_REPEL, guidance=replace(_REPEL.guidance, every=2)),
    "and reused": replace(_REPEL, guidance=replace(_REPEL.guidance, every=2, reuse=True)),
    "above 500": replace(_REPEL, sampler="dpm++2m", guidance=Guidance(weight=((500, 1.0),))),
    "never": replace(_REPEL, guidance=Guidance(weight=((-1, 0.0),))),
}


class Recording(Programs):
    """Programs that keep what was handed over."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.loops: list[tuple[str, ...]] = []

    def whole_loop(self, programs: Any, rows: int, carries: Any) -> Any:
        loop = super().whole_loop(programs, rows, carries)
        if loop is not None:
            self.loops.append(tuple(programs))
        return loop


@pytest.fixture(scope="module")
def plain(looped: Bundle) -> Programs:
    return Programs(looped, ONNXRuntimeCPU(threads=1))


@pytest.fixture(scope="module")
def loaded(looped: Bundle) -> Recording:
    return Recording(looped, LoopingCPU(threads=1))


@pytest.fixture
def looping(loaded: Recording) -> Recording:
    loaded.loops.clear()
    return loaded


def crops(faces: int, seed: int = 3) -> F32:
    return np.random.default_rng(seed).uniform(-1, 1, (faces, 3, 32, 32)).astype(np.float32)


def protect(programs: Programs, plan: Plan, faces: int, variants: int, **options: Any) -> F32:
    progress = options.pop("progress", None)
    operations = FaceOperations(programs, **options)
    act = operations.anonymize if plan.guidance.mode == "repel" else operations.hide
    keys = [NoiseKey.from_seed(face) for face in range(faces)]
    return act(crops(faces), plan, keys=keys, variants=variants, progress=progress)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("faces", "variants"), [(1, 1), (3, 1), (2, 2)])
def test_whole_loops_protect_as_the_loop_in_numpy(
    looping: Recording, plain: Programs, plan: Plan, faces: int, variants: int
) -> None:
    if plan.guidance.mode == "attract":
        variants = 1
    ours = protect(looping, plan, faces, variants)
    np.testing.assert_allclose(ours, protect(plain, plan, faces, variants), rtol=0, atol=1e-4)
    assert len(looping.loops) == 1 + (plan.fresh_noise < 1)
    guided = any(step.g for step in plan.table(NoiseSchedule()).steps)
    assert ("steer" in looping.loops[-1]) == guided


def test_guidance_is_not_lost(looping: Recording) -> None:
    """The comparison above would not notice guidance that does nothing on both ways."""
    strong = replace(_HIDE.guidance, weight=((-1, 1.0),))
    plans = [
        replace(_HIDE, guidance=replace(strong, **change))
        for change in ({}, {"repeats": 1}, {"weight": ((-1, 0.0),)})
    ]
    twice, once, never = (protect(looping, plan, 2, 1) for plan in plans)
    assert np.abs(twice - once).max() > 1e-3
    assert np.abs(twice - never).max() > 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "bdia", "o-belm"])
@pytest.mark.parametrize(("steps", "faces"), [(2, 3), (5, 1), (9, 3)])
def test_inversion_and_recovery_equal_those_in_numpy(
    looping: Recording, plain: Programs, sampler: Any, steps: int, faces: int
) -> None:
    inversion = Inversion(sampler, steps)
    ours, theirs = FaceOperations(looping), FaceOperations(plain)
    tokens, key = ours.invert(crops(faces), inversion)
    _, expected = theirs.invert(crops(faces), inversion)
    np.testing.assert_allclose(key, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    # A key opens on either, whoever made it.
    there, back = theirs.recover(tokens, key, inversion), ours.recover(tokens, expected, inversion)
    same = theirs.recover(tokens, expected, inversion)
    np.testing.assert_allclose(there, same, rtol=0, atol=1e-3)
    np.testing.assert_allclose(back, same, rtol=0, atol=1e-3)
    assert looping.loops == [("denoise", "advance")] * 2


@pytest.mark.parametrize("sampler", ["bdia", "o-belm"])
@pytest.mark.parametrize("steps", [3, 8, 21])
def test_exactly_invertible_tables_stay_so(
    looping: Recording, plain: Programs, sampler: Any, steps: int
) -> None:
    """There and back differs by float32's rounding; sums in float32 lose few bits more."""
    inversion = Inversion(sampler, steps)
    errors = []
    for programs in (looping, plain):
        operations = FaceOperations(programs)
        batch = operations.prepare(crops(3))
        found: list[F32] = []
        decode, operations._decode = operations._decode, found.append  # type: ignore[method-assign, assignment]
        operations.recover(*operations.invert(batch, inversion), inversion)
        operations._decode = decode  # type: ignore[method-assign]
        scale = float(np.abs(batch.latents).max())
        errors.append(float(np.abs(found[0] - batch.latents).max()) / scale)
    ours, theirs = errors
    one = float(np.finfo(np.float32).eps)
    assert ours < 8 * max(theirs, one * steps)
    assert ours < 1e-4


def test_parts_are_bounded_and_progress_is_told(looping: Recording, plain: Programs) -> None:
    told: list[tuple[int, int]] = []
    plan = PLANS["three gradients"]
    ours = protect(looping, plan, 3, 2, max_batch=4, progress=lambda *s: told.append(s))
    np.testing.assert_allclose(ours, protect(plain, plan, 3, 2), rtol=0, atol=1e-4)
    assert len(looping.loops) == 2
    steps = len(plan.table(NoiseSchedule()).steps)
    assert told == [(i + 1, steps) for i in range(steps)]


def test_what_is_not_finite_is_an_error(looping: Recording) -> None:
    operations = FaceOperations(looping)
    inversion = Inversion("o-belm", 4)
    tokens, key = operations.invert(crops(1), inversion)
    key[:] = np.inf
    with pytest.raises(EngineError, match="not finite"):
        operations.recover(tokens, key, inversion)


def test_what_a_table_needs_is_asked_for(looping: Recording) -> None:
    from diffveil.denoising import Denoiser
    from diffveil.wholeloops import run_anywhere

    table = o_belm(NoiseSchedule(), 4)
    denoise = Denoiser(looping, np.zeros((1, 10, 24), np.float32), table.timesteps)
    with pytest.raises(OptionError, match="x_prev is missing"):
        run_anywhere(looping, table, np.zeros((1, 8, 4, 4), np.float32), denoise, max_batch=1)


def test_loops_are_fed_strictly(looping: Recording) -> None:
    carries = {"advance": (("next", "latent", "previous"), ("epsilon", "previous_epsilon"))}
    loop = looping.whole_loop(["denoise", "advance"], 2, carries)
    zeros = np.zeros((2, 8, 4, 4), np.float32)
    loop.put(latent=zeros, conditioning=np.zeros((2, 5, 24), np.float32), noise=zeros)
    times = Scheduled((np.zeros(2, np.int64),), (0, 0))
    lacks = "'background', 'coefficients', 'direction', 'mask', 'previous', 'previous_epsilon'"
    with pytest.raises(EngineError, match=re.escape(f"program 'denoise, advance' lacks [{lacks}]")):
        loop.run({"timestep": times}, ["denoise", "advance"])
    with pytest.raises(EngineError, match="x0: not an input"):
        loop.put(x0=zeros)
    with pytest.raises(EngineError, match="no output"):
        loop.get("next")
    loop.close()


class Machine:
    """A fake GPU with TensorRT-RTX, over a bundle's engines."""

    def __init__(self, bundle: Bundle, **options: Any) -> None:
        self.driver = FakeDriver()
        self.trt = FakeTensorRT(self.driver)
        self.programs = Recording(
            bundle,
            TensorRT(
                driver=self.driver,
                import_module=lambda name: self.trt,
                find_gpu=lambda ordinal: TARGET,
                **options,
            ),
        )

    def count(self, function: str) -> int:
        return self.driver.calls.get(function, 0)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("plan", ["hide takes two gradients", "and reused"])
def test_a_whole_loop_is_one_graph_and_waits_once(
    looped: Bundle, plain: Programs, graphs: bool, plan: str
) -> None:
    machine = Machine(looped, cuda_graphs=graphs)
    expected = protect(plain, PLANS[plan], 3, 1)
    seen = []
    for _ in range(4):  # warm up, capture, replay
        before = machine.count("cuStreamSynchronize"), machine.count("cuGraphLaunch")
        ours = protect(machine.programs, PLANS[plan], 3, 1)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
        now = machine.count("cuStreamSynchronize"), machine.count("cuGraphLaunch")
        seen.append((now[0] - before[0], now[1] - before[1]))
    # Beside the loop encode, embed, recognize and decode are called, and expand for some tokens at
    # a time; the loop is waited for with its two results, and at its end.
    calls = seen[-1][0] - 3
    assert calls <= 4 + 2
    assert seen[-1][1] == (calls + 1) * graphs
    machine.programs.close()
    del machine.programs
    gc.collect()
    assert machine.driver.used == 0
    assert not machine.driver.executables


def test_recovery_is_handed_over_on_a_device(looped: Bundle, plain: Programs) -> None:
    machine = Machine(looped)
    inversion = Inversion("o-belm", 5)
    expected = FaceOperations(plain).recover(
        *FaceOperations(plain).invert(crops(2), inversion), inversion
    )
    for _ in range(3):
        operations = FaceOperations(machine.programs)
        ours = operations.recover(*operations.invert(crops(2), inversion), inversion)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3)
    assert machine.programs.loops == [("denoise", "advance")] * 6
    machine.programs.close()


def test_long_loops_are_not_captured(looped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffveil.engines import native_loop

    monkeypatch.setattr(native_loop, "_MOST_CAPTURED", 9)
    machine = Machine(looped)
    operations = FaceOperations(machine.programs)
    launches = []
    for steps in (4, 4, 4, 5, 5, 5):
        before = machine.count("cuGraphLaunch")
        batch = operations.prepare(crops(1))
        _ = batch.latents, batch.tokens
        tokens = machine.count("cuGraphLaunch")
        operations.invert(batch, Inversion("ddim", steps))
        launches.append(machine.count("cuGraphLaunch") - tokens)
        assert before <= tokens
    assert launches[2] == launches[5] + 1  # expand is one more, in both
    machine.programs.close()


def test_a_closed_engine_takes_its_loops_with_it(looped: Bundle) -> None:
    machine = Machine(looped)
    for _ in range(2):
        protect(machine.programs, _HIDE, 1, 1)
    machine.programs.engine("steer").close()
    with pytest.raises(EngineError, match="closed"):
        protect(machine.programs, _HIDE, 1, 1)
    machine.programs.close()


def test_programs_join_without_changing_what_is_there(tiny_bundle: Bundle, looped: Bundle) -> None:
    assert looped.fingerprint == tiny_bundle.fingerprint
    assert set(looped.manifest.programs) == {*PROGRAMS, *LOOP_PROGRAMS}
    for name in LOOP_PROGRAMS:
        entry = looped.program(name)
        assert entry.data == ()
        assert entry.file.bytes < 50_000
        assert entry.cost is not None
        assert entry.cost.flops > 0
        assert entry.parity
    assert describe(check_backend(looped, ONNXRuntimeCPU(threads=1))) == ""


def test_joining_twice_gives_the_same_bytes(looped: Bundle, tmp_path: Path) -> None:
    again = add_loop_programs(looped, tmp_path / "again")
    assert again.manifest == looped.manifest


def test_what_differs_from_pytorch_is_refused(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Advance):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            wrong = 1.0 if torch.compiler.is_exporting() else 1.01
            return wrong * super().forward(*inputs)

    monkeypatch.setattr(loop_programs, "Advance", Wrong)
    with pytest.raises(ParityError, match=r"advance\.next"):
        add_loop_programs(tiny_bundle, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_the_command_adds_them(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fuse-step", str(tiny_bundle.path), "-o", str(tmp_path / "b"), "--apart"]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["programs"] == list(LOOP_PROGRAMS)
    assert record["fingerprint"] == tiny_bundle.fingerprint
    assert main([*words, "--force"]) == 0
    assert "predict, steer, advance: " in capsys.readouterr().out
