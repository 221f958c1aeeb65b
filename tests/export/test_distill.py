"""Distilling a bundle's recognizer onto latents, and the program that comes of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffveil.bundle import Bundle
from diffveil.cli import distill as declared
from diffveil.cli.main import main
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.errors import OptionError
from diffveil.golden import check_backend
from diffveil.parity import describe
from diffveil_export import distill
from diffveil_export.distill import Distillation, encode_faces, evaluate
from diffveil_export.energy import identity_energy
from diffveil_export.latent_guide import add_latent_guide
from diffveil_export.latent_recognizer import LatentRecognizer


def student_for(bundle: Bundle, seed: int = 0) -> LatentRecognizer:
    torch.manual_seed(seed)
    d = bundle.dimensions
    network = LatentRecognizer(d.latent_channels, d.latent_size, d.embedding_width, 8, 1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # Statistics that are not those of a fresh layer, so that fusing has something to fold.
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return network.eval()


@pytest.fixture(scope="module")
def guided(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("guided") / "bundle"
    return add_latent_guide(tiny_bundle, student_for(tiny_bundle), target)


@pytest.fixture
def faces(rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [4, 8, 13, 16, 64])
def test_any_latent_size_becomes_a_unit_embedding(size: int) -> None:
    network = LatentRecognizer(4, size, 12, width=8, blocks=1).eval()
    with torch.no_grad():
        embedding = network(torch.randn(3, 4, size, size))
    assert embedding.shape == (3, 12)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))


def test_fusing_changes_nothing(tiny_bundle: Bundle) -> None:
    network = student_for(tiny_bundle)
    latent = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        before = network(latent)
        after = network.fuse()(latent)
        again = network.fuse()(latent)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, after, rtol=0, atol=0)


def test_a_kept_recognizer_is_read_back(tiny_bundle: Bundle, tmp_path: Path) -> None:
    network = student_for(tiny_bundle)
    network.save(tmp_path / "s.safetensors")
    latent = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(
            LatentRecognizer.load(tmp_path / "s.safetensors").eval()(latent), network(latent)
        )
    (tmp_path / "bad").write_bytes(b"\0" * 100)
    with pytest.raises(OptionError, match="no latent recognizer"):
        LatentRecognizer.load(tmp_path / "bad")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_program_is_the_gradient_of_the_energy(
    tiny_bundle: Bundle, guided: Bundle, batch: int
) -> None:
    """Held against autograd in float64 on the float32 network before it was fused."""
    reference = student_for(tiny_bundle).double()
    generator = torch.Generator().manual_seed(batch)
    x0 = torch.randn(batch, 8, 4, 4, generator=generator)
    anchor = torch.nn.functional.normalize(torch.randn(batch, 20, generator=generator), dim=1)
    repel, attract = torch.rand(2, batch, generator=generator)
    sibling = torch.rand(batch, batch, generator=generator)
    with Programs(guided, ONNXRuntimeCPU(threads=1)) as programs:
        gradient, energy, embedding = programs.guide_latent(
            x0=x0.numpy(),
            anchor=anchor.numpy(),
            repel=repel.numpy(),
            attract=attract.numpy(),
            sibling=sibling.numpy(),
        )
    leaf = x0.double().requires_grad_(True)
    expected = reference(leaf)
    share = identity_energy(
        expected, anchor.double(), repel.double(), attract.double(), sibling.double()
    )
    (slope,) = torch.autograd.grad(share.sum(), leaf)
    # Weights are stored in int8: a hundredth of the largest weight a channel, hence the bounds.
    assert (embedding * expected.detach().numpy()).sum(1).min() > 0.999
    np.testing.assert_allclose(energy, share.detach().numpy(), atol=0.05)
    assert np.corrcoef(gradient.ravel(), slope.numpy().ravel())[0, 1] > 0.99


def test_keys_stay_valid_and_the_rest_is_untouched(tiny_bundle: Bundle, guided: Bundle) -> None:
    assert guided.fingerprint == tiny_bundle.fingerprint
    assert set(guided.manifest.programs) == {*tiny_bundle.manifest.programs, "guide_latent"}
    for name, entry in tiny_bundle.manifest.programs.items():
        assert guided.program(name).file == entry.file
    assert guided.program("guide_latent").parity
    assert describe(check_backend(guided, ONNXRuntimeCPU(threads=1))) == ""


def test_it_can_be_replaced(tiny_bundle: Bundle, guided: Bundle, tmp_path: Path) -> None:
    other = student_for(tiny_bundle, seed=1)
    again = add_latent_guide(guided, other, tmp_path / "again", weights="float32")
    assert again.fingerprint == guided.fingerprint
    assert again.program("guide_latent").file.sha256 != guided.program("guide_latent").file.sha256


def test_a_recognizer_of_other_latents_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="latent recognizer is for"):
        add_latent_guide(tiny_bundle, LatentRecognizer(4, 8, 20, 8, 1), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_training_learns_and_resumes(
    tiny_bundle: Bundle,
    tmp_path: Path,
    faces: np.ndarray[Any, np.dtype[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted in rounds rather than minutes: a fake clock advances one second a look."""
    seconds = iter(range(10**9))
    monkeypatch.setattr(distill.time, "monotonic", lambda: float(next(seconds)))
    checkpoint = tmp_path / "state"
    with Programs(tiny_bundle, ONNXRuntimeCPU(threads=1)) as programs:
        latents = encode_faces(programs, iter([faces]))
        assert latents.shape == (40, 8, 4, 4)
        before = evaluate(programs, student_for(tiny_bundle), latents)

        def part(rounds: int) -> tuple[Distillation, list[float]]:
            training = Distillation(
                programs,
                latents,
                student_for(tiny_bundle),
                checkpoint=checkpoint,
                minutes=rounds / 60,
                rate=1e-2,
            )
            shares: list[float] = []
            training.run(lambda share, _: shares.append(share))
            return training, shares

        first, _ = part(20)
        second, shares = part(40)
        after = evaluate(programs, second.student, latents)
    other = LatentRecognizer(8, 4, 20, 16, 1)
    with (
        Programs(tiny_bundle, ONNXRuntimeCPU(threads=1)) as programs,
        pytest.raises(OptionError, match="no checkpoint of a network"),
    ):
        Distillation(programs, latents, other, checkpoint=checkpoint)
    assert first.step == 80
    assert second.step == 160
    assert shares[-1] == 1.0
    assert after["cosine"] > before["cosine"] + 0.2
    assert -1 <= after["gradient"] <= 1


def test_no_photos_no_training(tiny_bundle: Bundle) -> None:
    with (
        Programs(tiny_bundle, ONNXRuntimeCPU(threads=1)) as programs,
        pytest.raises(OptionError, match="no face was found"),
    ):
        encode_faces(programs, iter([]))


def test_the_command(
    tiny_bundle: Bundle,
    tmp_path: Path,
    faces: np.ndarray[Any, np.dtype[np.uint8]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index, face in enumerate(faces):
        Image.fromarray(face).save(photos / f"{index}.png")
    target, kept = tmp_path / "fast", tmp_path / "s.safetensors"
    command, output = ["distill-guide", str(tiny_bundle.path)], ["-o", str(target)]
    words = [*command, *output]
    training = [*command, str(photos), *output, "--aligned", "--minutes", "0.02", "--width", "8"]
    assert main([*training, "--held-out", "8", "--keep", str(kept), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["faces"] == 40
    assert -1 <= record["gradient"] <= 1
    assert "40 faces" in Bundle.load(target).manifest.provenance["guide_latent"]
    assert main([*words, "--student", str(kept), "--force"]) == 0
    assert "40 faces" in Bundle.load(target).manifest.provenance["guide_latent"]
    assert "guide_latent takes 1/" in capsys.readouterr().out
    assert main([*words, "--student", str(kept)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [[], ["photos", "--student", "x"], ["photos", "--minutes", "0"], ["photos", "--width", "1"]],
)
def test_misuse_is_said_before_any_work(words: list[str], tmp_path: Path) -> None:
    from diffveil_export.distill_cli import run

    parser = argparse.ArgumentParser()
    declared.add_arguments(parser)
    with pytest.raises(OptionError):
        run(parser.parse_args(["nowhere", *words, "-o", str(tmp_path / "out")]))
