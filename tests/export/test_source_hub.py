"""Repositories of the hub, from a cache in the hub library's own layout, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffveil.errors import OptionError
from diffveil_export.models.stable_diffusion import load_stable_diffusion
from diffveil_export.sources.hub import Repository, is_hub_id, open_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> Path:
    """The folder's model as `someone/tiny-sd`, cached at one commit."""
    repository = tmp_path / "cache" / "models--someone--tiny-sd"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would be asked of the hub fails at once."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@torch.no_grad()
def test_a_cached_repository_is_the_folder(
    cache: Path,
    folder: Path,
) -> None:
    files = {"msi": folder.parent / "msi.safetensors", "recognizer": folder.parent / "ir.pth"}
    here = load_stable_diffusion(folder, **files)
    there = load_stable_diffusion("someone/tiny-sd", cache=cache, **files)
    assert there.name == "tiny-sd"
    assert there.dimensions == here.dimensions
    assert COMMIT in there.provenance["source"]
    torch.testing.assert_close(there.unconditional, here.unconditional, rtol=0, atol=0)
    for ours, theirs in zip(there.modules().values(), here.modules().values(), strict=True):
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    pinned = load_stable_diffusion("someone/tiny-sd", cache=cache, revision=COMMIT, **files)
    assert pinned.schedule == here.schedule


@pytest.mark.parametrize("name", ["someone/other", "someone/tiny-sd"])
def test_what_is_not_cached_says_what_to_do(name: str, cache: Path) -> None:
    revision = "v9" if name.endswith("sd") else None
    with pytest.raises(OptionError, match="neither a folder or file here nor in the cache"):
        open_hub(name, revision=revision, cache=cache)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    vae = folder / "vae"
    weights = vae / "diffusion_pytorch_model.safetensors"
    assert weights.is_file()
    torch.save({}, vae / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OptionError, match=r"part 'vae' cannot be loaded.*safetensors only"):
        Repository(str(folder), {"local_files_only": True}).load(AutoencoderKL, "vae")


def test_missing_tensors_are_named(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    gone = "decoder.conv_out.weight"
    del state[gone]
    state["surprise"] = torch.zeros(1)
    save_file(state, file)
    repository = Repository(str(folder), {"local_files_only": True})
    with pytest.raises(OptionError, match=rf"part 'vae': missing {gone}; unexpected surprise$"):
        repository.load(AutoencoderKL, "vae")
    with pytest.raises(OptionError, match=rf"part 'vae': missing {gone}$"):
        repository.load(AutoencoderKL, "vae", partly=True)


def test_a_partly_cached_repository_is_not_guessed_at(cache: Path) -> None:
    snapshot = cache / "models--someone--tiny-sd" / "snapshots" / COMMIT
    repository = open_hub("someone/tiny-sd", cache=cache)
    assert repository.file("scheduler/scheduler_config.json") is not None
    (snapshot / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(OptionError, match="not in the cache"):
        repository.file("scheduler/scheduler_config.json")
    (snapshot / "model_index.json").write_text("{}")
    assert repository.file("scheduler/scheduler_config.json") is None


def test_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name-1.5")
    (tmp_path / "owner" / "name-1.5").mkdir(parents=True)
    assert not is_hub_id("owner/name-1.5")  # what is here comes first
    for text in ("name", "a/b/c", "../x", "/abs/path", "owner/", "owner/na me"):
        assert not is_hub_id(text)


def test_a_source_without_a_vocabulary(cache: Path, folder: Path, tmp_path: Path) -> None:
    snapshot = cache / "models--someone--tiny-sd" / "snapshots" / COMMIT
    (snapshot / "model_index.json").write_text("{}")
    words = json.loads((snapshot / "tokenizer" / "vocab.json").read_text())
    shutil.rmtree(snapshot / "tokenizer")
    files = {"msi": folder.parent / "msi.safetensors", "recognizer": folder.parent / "ir.pth"}
    with pytest.raises(OptionError, match="give --tokenizer"):
        load_stable_diffusion("someone/tiny-sd", cache=cache, **files)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.json").write_text(json.dumps(words))
    given = load_stable_diffusion(
        "someone/tiny-sd", cache=cache, tokenizer=tmp_path / "words", **files
    )
    assert given.dimensions.conditioning_length == 9
