"""The GPU benchmark runs end to end on a CPU at a tiny size, and says that this is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu
from benchmarks._gpu_bundle import SIZES, random_components
from benchmarks._gpu_flops import counted_flops
from benchmarks._gpu_gan import GanAnonymizer, StyleEncoder, StyleGenerator
from benchmarks._gpu_report import beside, measured, newest
from benchmarks._gpu_run import GpuRun, _ways
from benchmarks._gpu_timing import timed
from benchmarks._results import Recorder, Result, read

from diffveil.bundle import Bundle
from diffveil.engines import Engine, ONNXRuntimeCPU, Programs
from diffveil.operations import FaceOperations
from diffveil.presets import PRESETS
from diffveil.programs import DYNAMIC_AXES


def words(bundle: Path, folder: Path, *more: str) -> list[str]:
    """A run on a CPU that takes little."""
    return [
        *("--tiny", "--bundle", str(bundle), "--out", str(folder / "gpu.jsonl")),
        *("--batches", "2", "--seconds", "0", "--presets", "fast"),
        *more,
    ]


def test_it_runs_end_to_end(
    tiny_bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = ("--only", "kernels,programs,operations")
    # The time is up at once; the same command goes on.
    assert gpu.main(words(tiny_bundle_path, tmp_path, *ours, "--minutes", "-1")) == 0
    assert "the same command goes on" in capsys.readouterr().err
    assert gpu.main(words(tiny_bundle_path, tmp_path, *ours)) == 0
    told = capsys.readouterr()
    results = read(tmp_path / "gpu.jsonl")
    assert "No GPU was found" in told.err or results[0].hardware.get("gpu")
    # Correctness comes before any time of a backend; what cannot run says why.
    ran = [r for r in results if r.provider == "diffveil cpu"]
    assert [r.case for r in ran[:3]] == ["correctness/golden data"] * 2 + [
        "program/encode, 2 at once"
    ]
    assert (ran[0].metric, ran[0].p50) == ("passed", 1.0)
    absent = {r.provider: r.not_run for r in results if r.not_run}
    assert set(absent) >= {"diffveil tensorrt-rtx", "diffveil tensorrt"}
    assert all(f"{who}: " in told.err for who in absent)
    if not torch.cuda.is_available():
        assert "diffveil kernel" in absent
    by_case = {(r.case.partition(",")[0], r.metric): r for r in ran}
    names = [case for case, metric in by_case if metric == "rate"]
    assert set(names) >= {f"program/{name}" for name in ("encode", "denoise", "guide", "decode")}
    for name in names:
        time, share = by_case[name, "time a face"], by_case[name, "of the ceiling"]
        assert time.p50 is not None
        assert time.p50 <= time.config["p90"]
        assert (time.config["faces"], share.unit) == (2, "share")
    for name in ("anonymize", "hide", "recover"):
        assert by_case[f"{name}/fast", "throughput"].unit == "faces/s"
        assert by_case[f"{name}/fast", "rate"].p50
        assert (name + "/fast", "memory") in by_case
    text = (tmp_path / "gpu.md").read_text()
    assert text in told.out
    assert "### Programs, a face" in text
    assert "not run: " in text
    # Once more: nothing that is there is measured again.
    assert gpu.main(words(tiny_bundle_path, tmp_path, *ours)) == 0
    later = read(tmp_path / "gpu.jsonl")[len(results) :]
    assert not [r for r in later if r.metric == "time a face"]


def test_nothing_is_run_where_that_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The full size too: every network is built, without memory."""
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "gpu.jsonl")]) == 0
    told = capsys.readouterr().out
    assert "sd1, float16" in told
    assert "unet 859.5 M" in told
    assert "would be exported first" in told
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        gpu.main(["--only", "everything"])
    assert "expected of kernels, programs" in capsys.readouterr().err


def test_a_program_that_fails_is_kept_with_its_reason(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "gpu.jsonl", {"subject": "s"})
    run = GpuRun(recorder, 0.0, (1,), set(), float("inf"), lambda text: None)

    def fail() -> None:
        raise RuntimeError("CUDA out of memory\nmore")

    run.pytorch("recipe", iter([("hide", "eager", 1, fail)]), torch.device("cpu"))
    (result,) = read(tmp_path / "gpu.jsonl")
    assert result.not_run == "RuntimeError: CUDA out of memory"
    assert measured(tmp_path / "gpu.jsonl", "s") == {
        ("hide/recipe, 1 at once", "recipe, PyTorch eager")
    }
    assert measured(tmp_path / "gpu.jsonl", "another") == set()
    recorder.not_run("kernel/x", "diffveil kernel", "triton is not installed", absent=True)
    assert len(measured(tmp_path / "gpu.jsonl", "s")) == 1
    run._keep_kernel({"case": "k", "bytes": 1, "correct": False, "problem": "wrong by 3"})
    assert recorder.results[-1].not_run == "FAILED: wrong by 3"
    right = {"case": "k", "bytes": 1, "correct": True, "verdict": "faster", "over_floor": 1.5}
    run._keep_kernel(
        {**right, "ours_us": 3.0, "torch_us": 6.0, "compiled_us": None, "compiled_problem": "no"}
    )
    shown = newest(recorder.results, "s")
    assert [(r.provider, r.p50) for r in shown if r.case == "kernel/k"] == [
        ("diffveil kernel", 3.0),
        ("PyTorch", 6.0),
        ("torch.compile", None),
        ("diffveil kernel", 1.5),
    ]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_pytorchs_side_runs(tmp_path: Path) -> None:
    from benchmarks._gpu_torch import gan_cases, paper_cases, torch_device

    size, device = SIZES["tiny"], torch.device("cpu")
    given = (device, "float32", ("eager", "compile"), (1,), "eager")
    calls = {
        (name, mode): call
        for name, mode, _, call in paper_cases(random_components(size), *given)  # type: ignore[arg-type]
    }
    assert set(calls) == {
        (name, mode) for name in ("anonymize", "hide", "recover") for mode in ("eager", "compile")
    }
    image = calls["anonymize", "compile"]()
    assert isinstance(image, torch.Tensor)
    assert image.shape == (1, 1, 3, 32, 32)
    for _, _, batch, call in gan_cases(size, *given):  # type: ignore[arg-type]
        picture = call()
        assert isinstance(picture, torch.Tensor)
        assert picture.shape == (batch, 3, 16, 16)
    assert torch_device().type in ("cpu", "cuda")


def test_the_gan_has_the_published_size() -> None:
    """Parameters as the papers' networks have them: about 30 million without the mapping network,
    and 18 style vectors from three levels.
    """
    with torch.device("meta"):
        generator = StyleGenerator()
    assert generator.styles == 18
    assert 27e6 < sum(p.numel() for p in generator.parameters()) < 30e6
    widths = [conv.conv.weight.shape[0] for conv in generator.convs]  # type: ignore[union-attr]
    assert widths[::2] == [512, 512, 512, 512, 256, 128, 64, 32]


def test_a_small_gan_draws_what_it_should() -> None:
    network = GanAnonymizer((32, 16), (64, 16)).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 3, 32, 32)
        assert network.encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 16)
    assert network.encoder.levels == [2, 2, 2, 1, 1, 1, 1, 0]


def test_the_encoder_reads_the_published_levels() -> None:
    encoder = StyleEncoder()
    assert encoder.taps == [6, 20, 23]
    assert [encoder.levels.count(level) for level in (2, 1, 0)] == [3, 4, 11]
    assert [len(block.convs) // 2 for block in encoder.blocks] == [4] * 3 + [5] * 4 + [6] * 11  # type: ignore[arg-type]


def test_time_is_counted_in_calls() -> None:
    calls: list[int] = []
    assert len(timed(lambda: calls.append(1), 0.0, fewest=4, warm_up=2)) == 4
    assert len(calls) == 6


@pytest.mark.parametrize("name", ["fast", "paper"])
def test_flops_of_operations_are_those_of_the_calls_they_make(
    tiny_bundle_path: Path, name: str
) -> None:
    bundle, spent = Bundle.load(tiny_bundle_path), 0.0

    class Spy(ONNXRuntimeCPU):
        def load(self, bundle: Bundle, program: str) -> Engine:
            engine = super().load(bundle, program)
            cost = bundle.program(program).cost
            assert cost is not None

            class Watched:
                program = engine.program
                close = engine.close

                def run(self, **inputs: Any) -> dict[str, Any]:
                    nonlocal spent
                    rows = next(
                        inputs[t.name].shape[t.axes.index(axis)]
                        for t in engine.program.inputs
                        for axis in t.axes
                        if axis in DYNAMIC_AXES
                    )
                    spent += cost.flops * rows
                    return engine.run(**inputs)

            return Watched()

    for operation, way in _ways(PRESETS[name], bundle.image_size, 2).items():
        spent = 0.0
        with Programs(bundle, Spy()) as programs:
            way(FaceOperations(programs))
        assert counted_flops(bundle, way) == pytest.approx(spent, rel=1e-12), operation
        assert spent > 0


def test_others_stand_beside_our_fastest_backend() -> None:
    def time(case: str, provider: str, p50: float, faces: int, **config: str) -> Result:
        config_ = {"faces": faces, **config}
        return Result(case, provider, "time a face", "ms", p50, p50, p50, 1, config=config_)

    results = [
        time("anonymize/fast, 4 at once", "diffveil cpu", 50.0, 4, preset="fast"),
        time("anonymize/fast, 4 at once", "diffveil tensorrt-rtx", 5.0, 4, preset="fast"),
        time("anonymize/fast, 1 at once", "diffveil cpu", 20.0, 1, preset="fast"),
        time("program/decode, 4 at once", "diffveil cpu", 1.0, 4),
        time("anonymize/GAN, 4 at once", "GAN, PyTorch eager", 2.0, 4),
        time("hide/recipe, 4 at once", "recipe, PyTorch eager", 500.0, 4),
    ]
    lines = beside(results).splitlines()
    assert lines[2].split(" | ")[-2:] == ["GAN, PyTorch eager", "recipe, PyTorch eager |"]
    assert lines[4:] == [
        "| anonymize | fast | 4 | diffveil tensorrt-rtx | 5 | 0.4 × |  |",
        "| anonymize | fast | 1 | diffveil cpu | 20 |  |  |",
    ]
    assert beside(results[:4]) == beside([]) == ""
