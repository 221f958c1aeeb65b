"""What unpack.py takes out of the embedded bundle computes what the bundle's programs do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes/reference"))
import unpack
from common import load_recognizer, load_weights

from diffveil.bundle import Bundle
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil_export.reference.judge import FaceJudge
from diffveil_export.reference.recognizer import FaceRecognizer


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    unpack.main([str(Bundle.load().path), "--work", str(folder)])
    return folder


@pytest.mark.parametrize("batch", [1, 3])
def test_recognizer_and_judge_see_what_the_programs_see(work: Path, batch: int) -> None:
    faces = np.random.default_rng().uniform(-1, 1, (batch, 3, 128, 128)).astype(np.float32)
    recognizer = load_recognizer(work).eval()
    judge = FaceJudge(load_recognizer(work).fuse()).eval()
    judge.load_state_dict(load_weights(work / "judge.pt"))
    with Programs(Bundle.load(), ONNXRuntimeCPU()) as programs, torch.no_grad():
        given = torch.from_numpy(faces)
        for network, expected in (
            (judge, programs.assess(image=faces)),
            (recognizer, programs.recognize(image=faces)),
        ):
            np.testing.assert_allclose(network(given).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_files_that_are_there_stay(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_bytes() for file in work.iterdir() if file.is_file()}
    unpack.main([str(Bundle.load().path), "--work", str(work)])
    assert {f.name: f.read_bytes() for f in work.iterdir() if f.is_file()} == before
    assert "judge.pt is there already" in capsys.readouterr().out


def test_a_weight_that_is_missing_is_named() -> None:
    recognizer = FaceRecognizer(embedding=8)
    target = recognizer.state_dict()
    fused = recognizer.fuse().state_dict()
    assert unpack.with_idle_norms(fused, target).keys() == target.keys()
    fused.pop("pool")
    with pytest.raises(KeyError, match="pool"):
        unpack.with_idle_norms(fused, target)
