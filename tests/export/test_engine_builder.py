"""Building engines, up to the compiler: a stand-in for TensorRT says what it was asked for."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffveil.bundle import Bundle
from diffveil.engines.records import RECORD_FILE, ShapeRange, engine_folder, find_engine
from diffveil.errors import BackendUnavailableError, EngineError, OptionError
from diffveil.programs import PROGRAMS
from diffveil_export.engines import records
from diffveil_export.engines.builder import BuildOptions, BuildResult, build_engines
from diffveil_export.engines.profiles import BatchRange, profile_of
from diffveil_export.engines.progress import SCALE, BuildProgress
from diffveil_export.engines.trt_api import NativeOptions, TensorRTBuilder, load_builder
from fake_programs import DIMENSIONS, fake_bundle
from fake_tensorrt import fake_tensorrt

WHERE = ("tensorrt", "10.13.0", "sm90")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle whose programs have the declared tensors and stored weights, and compute little."""
    bundle = fake_bundle(tmp_path / "bundle")
    for spec in PROGRAMS.values():
        half = ir.tensor(np.ones(4, np.float16), name="h")
        weight = ir.Value(
            name="h", shape=ir.Shape([4]), type=ir.TensorType(half.dtype), const_value=half
        )
        cast = ir.Node("", "Cast", [weight], [ir.AttrInt64("to", 1)], outputs=[ir.Value(name="w")])
        sides = [
            [
                ir.Value(
                    name=t.name,
                    shape=ir.Shape(t.shape(DIMENSIONS)),
                    type=ir.TensorType(
                        ir.DataType.INT64 if t.dtype == "int64" else ir.DataType.FLOAT
                    ),
                )
                for t in tensors
            ]
            for tensors in (spec.inputs, spec.outputs)
        ]
        graph = ir.Graph(
            *sides, nodes=[cast], initializers=[weight], opset_imports={"": 21}, name="g"
        )
        ir.save(ir.Model(graph, ir_version=10), bundle.path / f"{spec.name}.onnx")
    monkeypatch.setattr(Bundle, "program_path", lambda self, name: self.path / f"{name}.onnx")
    return bundle


def tensorrt(version: str = "10.13.0", present: str | None = "sm90") -> TensorRTBuilder:
    return TensorRTBuilder("tensorrt", fake_tensorrt(version), find_present=lambda: present)


def asked_for(result: BuildResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.path.read_bytes())
    return found


def snapshot(bundle: Bundle) -> dict[str, bytes]:
    folder = bundle.path / "engines"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_program_is_built_recorded_and_found(bundle: Bundle) -> None:
    results = build_engines(bundle, tensorrt(), BuildOptions())
    assert [r.program for r in results] == list(PROGRAMS)
    assert {r.status for r in results} == {"built"}
    for result in results:
        found = find_engine(bundle, result.program, *WHERE)
        assert found.path == result.path
        assert found.record == result.record
        assert json.loads(found.read())["profiles"] == [
            {n: [list(s.min), list(s.opt), list(s.max)] for n, s in found.record.profile.items()}
        ]
    denoise = find_engine(bundle, "denoise", *WHERE).record
    assert denoise.inputs == {
        "latent": "float32",
        "timestep": "int64",
        "conditioning": "float32",
    }
    assert not [p for p in bundle.path.rglob("*") if p.name.startswith(".")]


@pytest.mark.parametrize(("version", "flags"), [("10.3.0", 2), ("10.13.0", 2), ("11.1.0", 0)])
def test_networks_are_strongly_typed_in_every_version(
    bundle: Bundle, version: str, flags: int
) -> None:
    options = BuildOptions(programs=("decode",))
    (result,) = build_engines(bundle, tensorrt(version), options)
    assert asked_for(result)["creation_flags"] == flags
    assert result.path.parent.name == f"tensorrt-{version}-sm90"


def test_options_reach_the_builder_and_the_record(bundle: Bundle) -> None:
    native = NativeOptions(
        memory_mib=64, refittable=True, strip_weights=True, weight_streaming=True
    )
    options = BuildOptions(programs=("decode",), native=native, weights="stored")
    (result,) = build_engines(bundle, tensorrt(), options)
    asked = asked_for(result)
    assert asked["flags"] == ["REFIT", "STRIP_PLAN", "WEIGHT_STREAMING"]
    assert asked["pools"] == {"WORKSPACE": 64 << 20}
    assert result.record is not None
    assert result.record.flags == {
        "weights": "stored",
        "memory_mib": 64,
        "refittable": True,
        "strip_weights": True,
        "weight_streaming": True,
    }


def test_engines_that_could_not_be_filled_again_are_refused(bundle: Bundle) -> None:
    """The runtime fills engines from the bundle's own file, whose weights are stored otherwise."""
    options = BuildOptions(programs=("decode",), native=NativeOptions(strip_weights=True))
    with pytest.raises(OptionError, match=r"'decode' compactly.* give `--weights stored`"):
        build_engines(bundle, tensorrt(), options)
    assert not snapshot(bundle)


def test_the_timing_cache_is_read_and_rewritten(bundle: Bundle, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.write_bytes(b"old")
    native = NativeOptions(timing_cache=cache)
    options = BuildOptions(programs=("decode", "encode"), native=native)
    first, second = build_engines(bundle, tensorrt(), options)
    assert (asked_for(first)["cache"], asked_for(second)["cache"]) == ("old", "old+")
    assert cache.read_bytes() == b"old++"
    cache.write_bytes(b"other GPU")
    with pytest.raises(OptionError, match=r"timing cache.*of another GPU"):
        build_engines(bundle, tensorrt(), replace(options, force=True))
    assert cache.read_bytes() == b"other GPU"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch": (1, 2)}, "changed: profile"),
        ({"weights": "stored"}, "changed: flags"),
        ({"native": NativeOptions(memory_mib=5)}, "changed: flags"),
        ({"force": True}, "forced"),
    ],
)
def test_what_is_unchanged_is_kept_and_what_changed_is_rebuilt(
    bundle: Bundle, change: dict[str, Any], reason: str
) -> None:
    options = BuildOptions(programs=("decode",))
    build_engines(bundle, tensorrt(), options)
    before = snapshot(bundle)
    assert [r.status for r in build_engines(bundle, tensorrt(), options)] == ["cached"]
    planned = replace(options, dry_run=True, **change)
    assert [(r.status, r.reason) for r in build_engines(bundle, tensorrt(), planned)] == [
        ("planned", reason)
    ]
    assert snapshot(bundle) == before
    (result,) = build_engines(bundle, tensorrt(), replace(options, **change))
    assert (result.status, result.reason) == ("built", reason)


def test_another_bundle_in_the_same_place_is_rebuilt(bundle: Bundle, tmp_path: Path) -> None:
    options = BuildOptions(programs=("decode",))
    build_engines(bundle, tensorrt(), options)
    other = replace(bundle, manifest=fake_bundle(tmp_path / "o", name="other").manifest)
    (result,) = build_engines(other, tensorrt(), options)
    assert result.reason == "changed: program_sha256"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "decode.engine").write_bytes(b"x"), "its file is damaged"),
        (lambda f: (f / "decode.engine").unlink(), "its file is missing"),
        (lambda f: (f / RECORD_FILE).write_bytes(b"{"), "its record is damaged"),
        (lambda f: (f / RECORD_FILE).unlink(), "not built yet"),
    ],
)
def test_damage_is_found_and_repaired(bundle: Bundle, damage: Any, reason: str) -> None:
    options = BuildOptions(programs=("decode",))
    build_engines(bundle, tensorrt(), options)
    damage(engine_folder(bundle, *WHERE))
    (result,) = build_engines(bundle, tensorrt(), options)
    assert result.reason == reason
    assert find_engine(bundle, "decode", *WHERE).record == result.record


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_failed_write_leaves_the_old_engine(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    options = BuildOptions(programs=("decode",))
    build_engines(bundle, tensorrt(), options)
    before, calls, real = snapshot(bundle), 0, os.replace

    def flaky(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(records.os, "replace", flaky)
    with pytest.raises(OSError, match="No space"):
        build_engines(bundle, tensorrt(), replace(options, batch=(1,)))
    assert snapshot(bundle) == before
    find_engine(bundle, "decode", *WHERE)


def test_ctrl_c_ends_the_build_and_leaves_the_old_engine(bundle: Bundle) -> None:
    options, builder = BuildOptions(programs=("decode", "encode")), tensorrt()
    build_engines(bundle, builder, options)
    before, handler, steps = snapshot(bundle), signal.getsignal(signal.SIGINT), []

    def interrupt(step: int) -> None:
        steps.append(step)
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    builder.trt.Builder.on_step = staticmethod(interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, builder, replace(options, force=True))
    assert steps == [0, 1]
    assert snapshot(bundle) == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_program_that_fails_stops_no_other(bundle: Bundle) -> None:
    path = bundle.path / "decode.onnx"
    model = ir.load(path)
    model.graph.append(ir.Node("", "Blur", [], outputs=[ir.Value(name="b")], name="node_7"))
    ir.save(model, path)
    done: list[BuildResult] = []
    options = BuildOptions(programs=("decode", "encode"))
    with pytest.raises(EngineError) as caught:
        build_engines(bundle, tensorrt(), options, done=done.append)
    assert [r.program for r in done] == ["encode"]
    text = str(caught.value)
    assert "1 of 2 engines could not be built" in text
    assert "decode for sm90: tensorrt 10.13.0 cannot read the program" in text
    assert "node 'node_7' (Blur): Assertion failed: no importer registered" in text


def test_what_the_builder_said_is_passed_on(bundle: Bundle) -> None:
    builder = tensorrt()
    builder.trt.Builder.fail = True
    with pytest.raises(EngineError, match=r"decode for sm90.*could not find any implementation"):
        build_engines(bundle, builder, BuildOptions(programs=("decode",)))
    with pytest.raises(EngineError, match="holds no engine"):
        find_engine(bundle, "decode", *WHERE)


def test_tensorrt_builds_for_the_present_gpu_only(bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="'89': TensorRT builds for the GPU of this machine only"):
        build_engines(bundle, tensorrt(), BuildOptions(targets=("89",)))
    with pytest.raises(BackendUnavailableError, match=r"no NVIDIA GPU.*tensorrt-rtx"):
        build_engines(bundle, tensorrt(present=None), BuildOptions())


@pytest.mark.parametrize("version", ["10.2.0", "9.3.0", "8.6.1"])
def test_an_old_tensorrt_is_refused(version: str) -> None:
    with pytest.raises(BackendUnavailableError, match=r"older than 10.3"):
        load_builder("tensorrt", import_trt=lambda name: fake_tensorrt(version))
    assert load_builder("tensorrt", import_trt=lambda name: fake_tensorrt("10.3.0"))


def test_a_missing_backend_says_what_to_install() -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'")

    with pytest.raises(BackendUnavailableError, match=r"diffveil\[export,tensorrt-rtx\]"):
        load_builder("tensorrt-rtx", import_trt=missing)
    with pytest.raises(OptionError, match="expected one of tensorrt-rtx, tensorrt"):
        load_builder("abacus")


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        BuildOptions(
            programs=("blur",),
            batch=(0,),
            weights="int3",  # type: ignore[arg-type]
            native=NativeOptions(memory_mib=0),
        )
    for option in ("programs: 'blur'", "batch: received [0]", "weights:", "memory: received 0"):
        assert option in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((8, 1, 4), (1, 4, 8)), ((1, 8), (1, 8, 8)), ((3,), (3, 3, 3))],
)
def test_batch_sizes_make_a_range(sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert BatchRange.of(sizes) == BatchRange(*expected)


@pytest.mark.parametrize("sizes", [(), (1, 2, 3, 4), (2, 2), (0, 1), (-1,), (1025,)])
def test_other_batch_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="batch: received"):
        BatchRange.of(sizes)


@given(
    sizes=st.sets(st.integers(1, 1024), min_size=1, max_size=3),
    program=st.sampled_from(list(PROGRAMS)),
)
def test_profiles_hold_every_size_between(sizes: set[int], program: str) -> None:
    spec, batch = PROGRAMS[program], BatchRange.of(tuple(sizes))
    network = {
        t.name: [-1 if isinstance(s, str) else s for s in t.shape(DIMENSIONS)] for t in spec.inputs
    }
    profile = profile_of(spec, DIMENSIONS, batch, network)
    assert list(profile) == [t.name for t in spec.inputs]
    for tensor in spec.inputs:
        shape = tensor.shape(DIMENSIONS)
        assert profile[tensor.name] == ShapeRange(
            *(
                tuple(rows if isinstance(s, str) else s for s in shape)
                for rows in (min(sizes), batch.opt, max(sizes))
            )
        )
    assert batch.opt in sizes
    if program == "guide":
        assert profile["sibling"].max == (max(sizes), max(sizes))


def test_a_network_of_other_shapes_is_refused_by_name() -> None:
    network = {"latent": [-1, 4, 4, 4], "noise": [1], "conditioning": [-1, 3, 5]}
    with pytest.raises(EngineError) as caught:
        profile_of(PROGRAMS["denoise"], DIMENSIONS, BatchRange(1, 1, 1), network)
    assert "noise: not an input" in str(caught.value)
    assert "latent: received [-1, 4, 4, 4], expected [-1, 8, 4, 4]" in str(caught.value)
    assert "timestep" not in str(caught.value)  # an input without effect may have been dropped


def test_progress_only_grows_and_ends_at_the_end() -> None:
    shown: list[int] = []
    progress = BuildProgress(lambda at, total: shown.append(at))
    progress.start("all", None, 2)
    progress.start("half", "all", 2)
    progress.step("half", 0)
    assert progress.fraction == 0.25
    progress.start("quarter", "half", 4)
    for step in range(4):
        progress.step("quarter", step)
    progress.finish("quarter")
    assert progress.fraction == 0.5
    progress.step("half", 1)
    progress.finish("half")
    progress.step("all", 0)
    progress.start("half", "all", 1)  # the name again, for another phase
    progress.step("half", 0)
    progress.finish("half")
    assert progress.fraction == 1.0
    progress.finish("all")
    assert shown == sorted(shown)
    assert shown[-1] == SCALE
    progress.cancelled = True
    assert progress.step("all", 1) is False
