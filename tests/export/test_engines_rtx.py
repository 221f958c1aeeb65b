"""TensorRT-RTX itself builds every program; its builder needs no GPU, running an engine does."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffveil.bundle import Bundle
from diffveil.cli.main import main
from diffveil.engines.device import present_target
from diffveil.engines.records import find_engine
from diffveil.errors import EngineError, OptionError
from diffveil.programs import PROGRAMS
from diffveil_export import storage
from diffveil_export.engines.builder import BuildOptions, BuildResult, build_engines
from diffveil_export.engines.progress import SCALE, BuildProgress
from diffveil_export.engines.trt_api import NativeOptions, TensorRTBuilder, load_builder
from diffveil_export.exporter import export_bundle
from tiny_models import tiny_few_components

trt: Any = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'diffveil[tensorrt-rtx]'"
)
pytestmark = pytest.mark.trt


@pytest.fixture(scope="module")
def builder() -> TensorRTBuilder:
    return load_builder("tensorrt-rtx")


@pytest.fixture(scope="module")
def bundle(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("rtx") / "bundle"
    return Bundle.load(shutil.copytree(tiny_bundle_path, folder))


@pytest.fixture(scope="module")
def built(bundle: Bundle, builder: TensorRTBuilder) -> tuple[BuildResult, ...]:
    seen: list[tuple[str, int, int]] = []
    results = build_engines(
        bundle,
        builder,
        BuildOptions(targets=("89",)),
        progress=lambda label, at, total: seen.append((label, at, total)),
    )
    for program in PROGRAMS:
        shown = [at for label, at, _ in seen if label == f"{program} sm89"]
        assert shown == sorted(shown)
        assert shown[-1] == SCALE
    return results


def test_every_program_builds_and_is_found(
    bundle: Bundle, builder: TensorRTBuilder, built: tuple[BuildResult, ...]
) -> None:
    assert [(r.program, r.status) for r in built] == [(name, "built") for name in PROGRAMS]
    for name, spec in PROGRAMS.items():
        engine = find_engine(bundle, name, "tensorrt-rtx", builder.version, "sm89")
        assert engine.record.inputs == {t.name: t.dtype for t in spec.inputs}
        assert engine.record.outputs == {t.name: t.dtype for t in spec.outputs}
        assert engine.record.max_batch == 8
        assert len(engine.read()) == engine.record.bytes > 10_000
    guide = find_engine(bundle, "guide", "tensorrt-rtx", builder.version, "sm89").record
    assert (guide.profile["sibling"].min, guide.profile["sibling"].max) == ((1, 1), (8, 8))


def test_the_bundle_is_what_it_was(
    bundle: Bundle, tiny_bundle: Bundle, built: tuple[BuildResult, ...]
) -> None:
    again = Bundle.load(bundle.path)
    again.verify(full=True)
    assert again.fingerprint == tiny_bundle.fingerprint
    assert main(["inspect", str(bundle.path), "--json"]) == 0


def test_nothing_is_built_twice(
    bundle: Bundle, builder: TensorRTBuilder, built: tuple[BuildResult, ...]
) -> None:
    before = {r.path: r.path.stat().st_mtime_ns for r in built}
    again = build_engines(bundle, builder, BuildOptions(targets=("8.9",)))
    assert {r.status for r in again} == {"cached"}
    assert {r.path: r.path.stat().st_mtime_ns for r in again} == before


def test_an_engine_can_be_loaded_where_a_gpu_is(
    bundle: Bundle, builder: TensorRTBuilder, built: tuple[BuildResult, ...]
) -> None:
    engine = find_engine(bundle, "decode", "tensorrt-rtx", builder.version, "sm89")
    if present_target() != "sm89":
        pytest.skip("deserialising asks the driver for the GPU: needs one of capability 8.9")
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    assert runtime.deserialize_cuda_engine(engine.read()) is not None


@pytest.mark.parametrize("target", ["86", "sm120"])
def test_other_gpus_have_folders_of_their_own(
    bundle: Bundle, builder: TensorRTBuilder, built: tuple[BuildResult, ...], target: str
) -> None:
    options = BuildOptions(targets=(target,), programs=("recognize",), batch=(1, 3))
    (result,) = build_engines(bundle, builder, options)
    name = f"sm{target.removeprefix('sm')}"
    assert result.path.parent.name == f"tensorrt-rtx-{builder.version}-{name}"
    assert find_engine(bundle, "recognize", "tensorrt-rtx", builder.version, name)
    assert result.path.read_bytes() != built[5].path.read_bytes()


def test_stored_weights_build_too(
    bundle: Bundle, builder: TensorRTBuilder, built: tuple[BuildResult, ...]
) -> None:
    options = BuildOptions(targets=("80",), programs=("decode",))
    (folded,) = build_engines(bundle, builder, options)
    assert folded.record is not None
    stored_options = BuildOptions(targets=("75",), programs=("decode",), weights="stored")
    (stored,) = build_engines(bundle, builder, stored_options)
    assert stored.record is not None
    assert stored.record.flags["weights"] == "stored"
    assert stored.record.program_sha256 == folded.record.program_sha256


@pytest.mark.parametrize("weights", ["folded", "stored"])
def test_weights_in_four_bits_build(
    builder: TensorRTBuilder,
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "_LARGE", 2048)  # a tiny model's are small
    bundle = export_bundle(tiny_few_components(), tmp_path / "bundle", weights="int4").bundle
    program = bundle.program_path("denoise").read_bytes()
    options = BuildOptions(targets=("80",), programs=("denoise",), weights=weights)  # type: ignore[arg-type]
    (result,) = build_engines(bundle, builder, options)
    assert result.status == "built"
    assert bundle.program_path("denoise").read_bytes() == program
    native = NativeOptions(strip_weights=True)
    with pytest.raises(OptionError, match="four bits"):
        build_engines(bundle, builder, replace(options, targets=("89",), native=native))


def test_memory_and_streaming_are_accepted(bundle: Bundle, builder: TensorRTBuilder) -> None:
    native = NativeOptions(memory_mib=64, weight_streaming=True)
    options = BuildOptions(targets=("121",), programs=("recognize",), native=native)
    (result,) = build_engines(bundle, builder, options)
    assert result.record is not None
    assert result.record.flags["memory_mib"] == 64


def test_options_that_this_builder_lacks_are_refused(
    bundle: Bundle, builder: TensorRTBuilder, tmp_path: Path
) -> None:
    native = NativeOptions(timing_cache=tmp_path / "cache")
    with pytest.raises(OptionError, match="timing-cache: TensorRT-RTX has none"):
        build_engines(bundle, builder, BuildOptions(targets=("89",), native=native))
    with pytest.raises(OptionError) as caught:
        build_engines(bundle, builder, BuildOptions(targets=("90", "abc", "89", "8.9")))
    for problem in ("sm90: TensorRT-RTX", "'abc'", "appears twice"):
        assert problem in str(caught.value)


def test_the_parsers_own_words_are_in_the_error(builder: TensorRTBuilder, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model" * 9)
    with pytest.raises(EngineError, match=r"cannot read the program.*Failed to parse the ONNX"):
        builder.build(broken, "sm89", NativeOptions(), lambda network: {}, BuildProgress())


def test_cancelling_stops_the_builder(bundle: Bundle, builder: TensorRTBuilder) -> None:
    def interrupt(label: str, at: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    options = BuildOptions(targets=("89",), programs=("recognize",), force=True)
    before = find_bytes(bundle)
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, builder, options, progress=interrupt)
    assert find_bytes(bundle) == before


def find_bytes(bundle: Bundle) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (bundle.path / "engines").rglob("*sm89/*")}


def test_the_command_line_builds_and_reports(
    bundle: Bundle,
    builder: TensorRTBuilder,
    built: tuple[BuildResult, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["build", str(bundle.path), "--backend", "tensorrt-rtx", "--target", "89"]
    assert main([*words, "--programs", "encode", "--force", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert (report["program"], report["status"], report["reason"]) == ("encode", "built", "forced")
    assert Path(report["path"]).stat().st_size == report["bytes"]
    assert main([*words, "--dry-run"]) == 0
    assert "7 cached in" in capsys.readouterr().out
    if present_target() is None:
        assert main([*words[:-2], "--dry-run"]) == 1
        assert "--target 86,89,120" in capsys.readouterr().err
