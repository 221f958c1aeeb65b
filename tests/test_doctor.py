"""`doctor` says what is there and what is missing, and never fails at saying it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from diffveil import doctor
from diffveil.cli.doctor import describe


def test_report_is_json_and_names_every_backend_with_a_reason() -> None:
    report = doctor.diagnose()
    assert json.loads(json.dumps(report.to_json()))["version"] == report.version
    assert report.backends
    assert all(check.detail for check in (*report.backends, *report.checks))
    assert report.chosen in {None, *(check.name for check in report.backends if check.ok)}


def test_installed_versions_are_the_real_ones() -> None:
    packages = doctor.diagnose().packages
    assert packages["numpy"] == metadata.version("numpy")
    assert packages["onnxruntime"] == metadata.version("onnxruntime")


def test_a_folder_that_is_no_bundle_is_a_finding_not_a_failure(tmp_path: Path) -> None:
    report = doctor.diagnose(tmp_path)
    (bundle,) = (check for check in report.checks if check.name == "bundle")
    assert not bundle.ok
    assert str(tmp_path) in bundle.detail
    assert not report.ready
    assert "[no] bundle" in describe(report)
    assert "Not ready" in describe(report)


def test_two_onnx_runtimes_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: real(name) or "1.0")
    report = doctor.diagnose()
    (conflict,) = (check for check in report.checks if check.name == "one ONNX Runtime")
    assert not conflict.ok
    assert "uninstall both" in conflict.detail
    assert not report.ready


def test_the_chosen_backend_is_marked() -> None:
    report = doctor.diagnose()
    assert report.chosen == "cpu"
    marked = [line for line in describe(report).splitlines() if "<- chosen" in line]
    assert len(marked) == 1
    assert "cpu" in marked[0]
