"""A backend that fails is replaced by the next one, once, and nothing of it reaches a result."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from diffveil import Protector
from diffveil.bundle import Bundle
from diffveil.doctor import diagnose
from diffveil.engines import (
    BACKENDS,
    Availability,
    Backend,
    BackendWarning,
    ONNXRuntimeCPU,
    Programs,
    select_backend,
)
from diffveil.engines._outputs import check_outputs
from diffveil.errors import BackendUnavailableError, EngineError
from diffveil.golden import examiner
from diffveil.presets import PRESETS
from diffveil.programs import PROGRAMS
from fake_photos import ListedDetector, Pixels
from fake_programs import FakeBackend, fake_bundle
from faulty_backends import FAULTS, Fault, FaultyBackend


@pytest.fixture
def latent(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((2, 8, 4, 4)).astype(np.float32)


def programs_on(bundle: Bundle, *backends: Backend, golden: bool = True) -> Programs:
    first, *others = backends
    examine = examiner(bundle) if golden else None
    return Programs(bundle, first, others=others, examine=examine)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_reaches_the_caller(fault: Fault, tiny_bundle: Bundle, latent: np.ndarray) -> None:
    cpu = ONNXRuntimeCPU(threads=1)
    faulty = FaultyBackend(cpu, fault=fault)
    expected = cpu.load(tiny_bundle, "decode").run(latent=latent)["image"]
    with programs_on(tiny_bundle, faulty, cpu) as programs:
        with pytest.warns(BackendWarning, match="'faulty' failed and 'cpu' runs instead") as caught:
            image = programs.decode(latent=latent)
        assert len(caught) == 1
        np.testing.assert_array_equal(image, expected)
        assert programs.backend is cpu
        assert "faulty failed" in programs.why
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            programs.decode(latent=latent)
    assert faulty.open == 0


@pytest.mark.parametrize("fault", ["run", "nan", "infinite", "black", "memory"])
def test_what_breaks_later_is_found_too(
    fault: Fault, tiny_bundle: Bundle, latent: np.ndarray
) -> None:
    """The golden check has passed; the fault comes with the second call."""
    cpu = ONNXRuntimeCPU(threads=1)
    faulty = FaultyBackend(cpu, fault=fault)
    faulty.after = 2  # the golden inputs, and one call
    with programs_on(tiny_bundle, faulty, cpu) as programs:
        first = programs.decode(latent=latent)
        with pytest.warns(BackendWarning):
            second = programs.decode(latent=latent)
    np.testing.assert_array_equal(first, second)


def test_every_backend_may_fail_and_then_it_is_an_error(
    tiny_bundle: Bundle, latent: np.ndarray
) -> None:
    cpu = ONNXRuntimeCPU(threads=1)
    one = FaultyBackend(cpu, "one", "load")
    two = FaultyBackend(cpu, "two", "nan")
    with (
        programs_on(tiny_bundle, one, two, golden=False) as programs,
        pytest.warns(BackendWarning, match="'one' failed and 'two'"),
        pytest.raises(EngineError, match="image holds NaN"),
    ):
        programs.decode(latent=latent)
    assert one.open == two.open == 0


def test_a_wrong_call_is_nobodys_fault_but_the_callers(
    tiny_bundle: Bundle, latent: np.ndarray
) -> None:
    faulty = FaultyBackend(ONNXRuntimeCPU(threads=1))
    with programs_on(tiny_bundle, faulty, ONNXRuntimeCPU(threads=1)) as programs:
        with pytest.raises(EngineError, match="was called wrongly"):
            programs.decode(latent=latent[:, :3])
        assert programs.backend is faulty


def test_whole_photos_come_out_as_if_the_backend_had_never_been(
    tmp_path: Path, detector: ListedDetector, group: Pixels
) -> None:
    bundle, fake = fake_bundle(tmp_path / "bundle"), FakeBackend()
    expected = Protector(Programs(bundle, fake), detector=detector).anonymize(group, seed=1)
    faulty = FaultyBackend(fake, fault="nan", at="guide")
    faulty.after = 3  # in the middle of the sampling loop
    protector = Protector(Programs(bundle, faulty, others=[fake]), detector=detector)
    with pytest.warns(BackendWarning):
        result = protector.anonymize(group, seed=1)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
    assert result.key == expected.key
    assert result.backend == protector.backend == "fake"
    assert "faulty failed: program 'guide' went wrong" in result.backend_reason


def test_a_loop_that_fails_begins_anew_on_the_next_backend(
    tmp_path: Path, detector: ListedDetector, group: Pixels
) -> None:
    bundle, fake = fake_bundle(tmp_path / "bundle", optional=["step"]), FakeBackend()
    preset = PRESETS["balanced"]
    expected = Protector(Programs(bundle, fake), detector=detector).anonymize(
        group, seed=1, preset=preset, make_key=False
    )
    faulty = FaultyBackend(fake, fault="run", at="step")
    faulty.after = 4
    protector = Protector(Programs(bundle, faulty, others=[fake]), detector=detector)
    with pytest.warns(BackendWarning):
        result = protector.anonymize(group, seed=1, preset=preset, make_key=False)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


def test_threads_fall_back_together(tiny_bundle: Bundle, latent: np.ndarray) -> None:
    cpu = ONNXRuntimeCPU(threads=1)
    faulty = FaultyBackend(cpu, fault="run")
    programs = programs_on(tiny_bundle, faulty, cpu, golden=False)
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(programs.decode(latent=latent)))
        for _ in range(4)
    ]

    def together() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with pytest.warns(BackendWarning) as caught:
        together()
    assert len(caught) == 1
    assert len(results) == 4
    assert all(np.array_equal(r, results[0]) for r in results)
    assert faulty.open == 0


def test_auto_takes_the_first_that_passes(
    tiny_bundle: Bundle, latent: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = ONNXRuntimeCPU(threads=1)
    _register(monkeypatch, wrong=FaultyBackend(cpu, "wrong", "wrong"), right=FaultyBackend(cpu))
    with Protector.load(tiny_bundle, backend="auto", verify=True) as protector:
        assert protector.backend == "faulty"
        reason = protector.backend_reason
        assert reason.startswith("the first that can run here, in the expected order of speed; ")
        assert "wrong cannot: always; backend 'wrong' computes" in reason
    with Protector.load(tiny_bundle) as protector:
        assert protector.backend == "wrong"
        with pytest.warns(BackendWarning, match="it computes something else than PyTorch did"):
            protector.programs.decode(latent=latent)
        assert protector.backend == "faulty"


def test_a_backend_that_is_named_is_neither_judged_nor_replaced(
    tiny_bundle: Bundle, latent: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    _register(monkeypatch, wrong=FaultyBackend(ONNXRuntimeCPU(threads=1), "wrong", "nan"))
    with Protector.load(tiny_bundle, backend="wrong") as protector:
        assert protector.backend_reason == "it was named"
        with pytest.raises(EngineError, match="NaN"):
            protector.programs.decode(latent=latent)


def test_without_golden_data_only_the_reference_backend_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _register(monkeypatch, fast=FaultyBackend(FakeBackend(), "fast"))
    bundle = fake_bundle(tmp_path / "bundle")
    selection = select_backend("auto", bundle)
    assert selection.require().name == "cpu"
    assert "no golden data" in selection.why
    assert select_backend("fast", bundle).require().name == "fast"


def test_a_backend_without_what_it_needs_of_the_bundle_is_passed_over(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Needy(FaultyBackend):
        def ready(self, bundle: Bundle) -> Availability:
            return Availability(False, f"no engines in {bundle.name}")

    _register(monkeypatch, needy=Needy(ONNXRuntimeCPU(threads=1), "needy"))
    assert "needy cannot: no engines in tiny" in select_backend(None, tiny_bundle).why
    with pytest.raises(BackendUnavailableError, match="no engines in tiny"):
        select_backend("needy", tiny_bundle).require()


def test_doctor_says_which_backend_computes_something_else(
    tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _register(monkeypatch, wrong=FaultyBackend(ONNXRuntimeCPU(threads=1), "wrong", "wrong"))
    assert diagnose(tiny_bundle_path).chosen == "wrong"
    report = diagnose(tiny_bundle_path, verify=True)
    assert report.chosen == "cpu"
    wrong = next(check for check in report.backends if check.name == "wrong")
    assert "decode.image" in wrong.detail
    assert not next(check for check in report.checks if check.name == "results of wrong").ok


def test_one_colour_is_right_for_one_colour() -> None:
    spec, flat = PROGRAMS["decode"], np.zeros((1, 3, 8, 8), np.float32)
    check_outputs(spec, {"latent": np.ones((1, 4, 2, 2), np.float32)}, {"image": flat})
    varied = np.arange(16, dtype=np.float32).reshape(1, 4, 2, 2)
    with pytest.raises(EngineError, match=r"one colour in rows \[0\]"):
        check_outputs(spec, {"latent": varied}, {"image": flat})
    dim = flat + np.linspace(0, 0.01, 8, dtype=np.float32)
    check_outputs(spec, {"latent": varied}, {"image": dim})


def test_large_numbers_are_numbers() -> None:
    spec, large = PROGRAMS["encode"], np.full((1, 4, 8, 8), 3e38, np.float32)
    check_outputs(spec, {}, {"latent": large})
    with pytest.raises(EngineError, match="latent holds"):
        check_outputs(spec, {}, {"latent": np.full_like(large, np.inf)})


def _register(monkeypatch: pytest.MonkeyPatch, **backends: Backend) -> None:
    """Put backends before all others; the same object at every choice."""
    slower = {name: BACKENDS[name] for name in ("cpu",)}
    fast = {name: (lambda threads, b=backend: b) for name, backend in backends.items()}
    monkeypatch.setattr("diffveil.engines._select.BACKENDS", {**fast, **slower})
