"""`benchmarks.kernels` without a GPU: it says so, and its cases are right where they can be run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import kernels
from benchmarks._kernel_cases import Case, kernel_cases

from diffveil_kernels.geometry import crop_table, paste_table
from diffveil_kernels.jit import ops
from diffveil_kernels.specs import PARTS
from diffveil_kernels.traffic import (
    face_crop_bytes,
    face_paste_bytes,
    keyed_normal_bytes,
    linear_step_bytes,
)


@pytest.mark.usefixtures("few_programs")
def test_every_case_passes_its_check_and_fails_it_when_something_is_wrong() -> None:
    cases = kernel_cases("cpu", batch=2, size=16, photo=40)
    assert [case.name.split()[0] for case in cases] == [
        *("keyed_normal", "linear_step", "face_crop", "face_paste")
    ]
    for case in cases:
        right, difference = kernels.check(case, ops.run)
        assert right, (case.name, difference)
        plain = case.plain().numpy().astype(np.float64)
        assert np.abs(plain - case.expected).max() <= case.tolerance
        result = case.out.clone()

        def spoilt(_: object, case: Case = case, result: torch.Tensor = result) -> None:
            case.out.copy_(result)
            case.out.view(-1)[5] += 3

        assert not kernels.check(case, lambda calls: None)[0]
        assert not kernels.check(case, spoilt)[0]
        if case.out.is_floating_point():
            result.view(-1)[7] = float("nan")
            assert not kernels.check(case, spoilt)[0]


def test_what_is_wrong_is_not_timed_and_the_rest_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way through `measure`, with a clock and a compiler that are not real."""

    def clock(way: Callable[[], object]) -> float:
        way()
        return 5.0

    def compiler(way: Callable[[], object]) -> Callable[[], object]:
        def failing() -> object:
            raise RuntimeError("no compiler here")

        return failing

    monkeypatch.setattr(kernels, "_bandwidth", lambda: 1e12)
    monkeypatch.setattr(kernels, "_microseconds", clock)
    monkeypatch.setattr(torch, "compile", compiler)
    good, bad = kernel_cases("cpu", batch=1, size=16, photo=40)[:2]
    saved: list[int] = []
    records = kernels.measure(
        [good, replace(bad, expected=bad.expected + 1)],
        {"triton": ops.run},
        save=lambda records: saved.append(len(records)),
    )
    assert saved == [1, 2]
    assert [record["correct"] for record in records] == [True, False]
    assert records[0]["compiled_problem"] == "RuntimeError: no compiler here"
    assert records[0]["torch_over_ours"] == 1.0
    assert "ours_us" not in records[1]
    assert records[1]["problem"].startswith("wrong by {'triton': ")
    machine = dict.fromkeys(("gpu", "driver", "torch", "triton"), "?")
    assert kernels.table(machine, records).count("\n| ") == 3


def test_a_kernel_that_crashes_is_recorded_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crash(calls: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "_bandwidth", lambda: 1e12)
    cases = kernel_cases("cpu", batch=1, size=16, photo=40)[:2]
    records = kernels.measure(cases, {"triton": crash}, save=lambda records: None)
    assert [record["correct"] for record in records] == [False, False]
    assert all("RuntimeError: an illegal memory" in record["problem"] for record in records)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_apart_it_says_why_there_is_nothing() -> None:
    records, why = kernels.measure_apart(1, 16, 40)
    assert records == []
    assert why.startswith("benchmarks.kernels measures on an NVIDIA GPU")


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "_there", lambda name: True)
    assert kernels.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(kernels, "_there", lambda name: name != "cuda.core")
    assert kernels.main(["--out", str(tmp_path / "out")]) == 2
    assert "cuda.core not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_what_is_faster_than_both_other_ways_is_called_so() -> None:
    def verdict(ours: float, torch_us: float | None, compiled_us: float | None) -> str:
        times = {"ours_us": ours, "torch_us": torch_us, "compiled_us": compiled_us, "floor_us": 1.0}
        return str(kernels._ratios(times)["verdict"])

    assert verdict(1.0, 4.0, 2.0) == "faster"
    assert verdict(1.0, 4.0, 1.02).startswith("not faster")
    assert verdict(1.0, 4.0, None) == "faster"
    assert verdict(1.0, None, None).startswith("not faster")
    record = {"case": "x", "bytes": 5, "floor_us": 1.0, "correct": False, "problem": "?"}
    machine = dict.fromkeys(("gpu", "driver", "torch", "triton"), "?")
    assert "FAILED: ?" in kernels.table(machine, [record])


def test_bytes_are_counted_by_hand() -> None:
    assert keyed_normal_bytes(2, 10) == 2 * (32 + 40)
    plain = linear_step_bytes(1, 4, 16, terms=1, guided=False, normalised=False, blend=False)
    assert plain == 4 * 64 * 3 + 60
    guided = linear_step_bytes(1, 4, 16, terms=1, guided=True, normalised=True, blend=True)
    assert guided == 4 * 64 * 6 + 4 * 16 + 60 + 16 * PARTS
    matrix = np.array([[1.0, 0, -8], [0, 1.0, -8]])
    crop = crop_table([(100, 100)], [0], [matrix], 16)
    # Photo pixels 7 … 24 and four more around: 3 … 28, nothing reduced.
    assert face_crop_bytes(crop, 2) == 3 * 26**2 * 3 + 2 * 3 * 16**2
    paste = paste_table([(100, 100)], [0], [matrix], np.zeros((16, 16), np.float32))
    assert face_paste_bytes(paste, 2) == 2 * 3 * 256 + 4 * 256 + 6 * 256 + 6 * 20**2
