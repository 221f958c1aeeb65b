"""Surrogates: mixed out of faces, written into a bundle, by a command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffveil.bundle import SURROGATES_FILE, Bundle
from diffveil.cli.main import main
from diffveil.engines import ONNXRuntimeCPU, Programs
from diffveil.errors import OptionError
from diffveil.scenes import to_images
from diffveil.surrogates import Surrogates
from diffveil_export.surrogates import add_surrogates, look_at, mix

F32 = NDArray[np.float32]


def unit(array: F32) -> F32:
    length = np.linalg.norm(array, axis=-1, keepdims=True)
    return (array / length).astype(np.float32)


@pytest.fixture
def crops(rng: np.random.Generator, tiny_bundle: Bundle) -> NDArray[np.uint8]:
    size = tiny_bundle.image_size
    return rng.integers(0, 256, (20, size, size, 3), dtype=np.uint8)


def test_each_is_the_mean_of_different_people_who_look_alike(rng: np.random.Generator) -> None:
    tokens = rng.standard_normal((60, 10, 5)).astype(np.float32)
    people = unit(rng.standard_normal((60, 16)).astype(np.float32))
    mixed = mix(tokens, people, 7, people=3, seed=5)
    assert len(mixed) == 7
    # The oracle: greedily the nearest that is like none of those before.
    looks = (tokens.astype(np.float64) - tokens.mean(axis=0)).reshape(60, -1)
    looks /= np.linalg.norm(looks, axis=1, keepdims=True)
    drawn = np.random.default_rng(5).choice(60, 7, replace=False)
    mixtures = mixed.tokens(np.arange(7))
    for first, token, identity in zip(drawn, mixtures, mixed.identities, strict=True):
        members = [int(first)]
        for candidate in np.argsort(-(looks @ looks[first])):
            if len(members) < 3 and all(people[candidate] @ people[m] < 0.3 for m in members):
                members.append(int(candidate))
        np.testing.assert_allclose(token, tokens[members].mean(axis=0), atol=0.1)
        np.testing.assert_allclose(identity, unit(people[members].mean(axis=0)), atol=1e-6)


def test_as_many_directions_are_kept_as_faces_fill(rng: np.random.Generator) -> None:
    few = rng.standard_normal((300, 4)) @ rng.standard_normal((4, 10 * 5))
    tokens = (7 + few + 1e-3 * rng.standard_normal(few.shape)).reshape(300, 10, 5)
    people = unit(rng.standard_normal((300, 16)).astype(np.float32))
    mixed = mix(tokens.astype(np.float32), people, 100)
    assert len(mixed.basis) <= 4
    flat = mixed.basis.reshape(len(mixed.basis), -1).astype(np.float64)
    np.testing.assert_allclose(flat @ flat.T, np.eye(len(flat)), atol=1e-5)


def test_one_person_is_not_mixed_with_themselves(rng: np.random.Generator) -> None:
    tokens = rng.standard_normal((9, 10, 5)).astype(np.float32)
    same = np.repeat(unit(rng.standard_normal((1, 16)).astype(np.float32)), 9, axis=0)
    with pytest.raises(OptionError, match="too few people"):
        mix(tokens, same, 4)
    with pytest.raises(OptionError, match="expected at least 1 and 2"):
        mix(tokens, same, 4, people=1)
    with pytest.raises(OptionError, match="expected at least 1 and 2"):
        mix(tokens, same, 0)


def test_faces_and_their_mirror_images_are_looked_at(
    tiny_bundle: Bundle, crops: NDArray[np.uint8]
) -> None:
    images, told = to_images(crops), []
    with Programs(tiny_bundle, ONNXRuntimeCPU()) as programs:
        tokens, identities = look_at(programs, [images[:3], images[3:5]], told.append)
        mirrored = np.ascontiguousarray(images[:3, :, :, ::-1])
        np.testing.assert_allclose(tokens[3:6], programs.embed(image=mirrored), atol=1e-5)
        np.testing.assert_allclose(identities[:3], programs.recognize(image=images[:3]), atol=1e-5)
        with pytest.raises(OptionError, match="no faces"):
            look_at(programs, [])
    assert len(tokens) == len(identities) == 10
    assert told == [3, 2]


def test_a_bundle_keeps_its_keys_and_gives_back_what_was_added(
    tiny_bundle: Bundle, tmp_path: Path, rng: np.random.Generator
) -> None:
    d = tiny_bundle.dimensions
    tokens = rng.standard_normal((30, d.stages, d.token_width)).astype(np.float32)
    people = unit(rng.standard_normal((30, d.embedding_width)).astype(np.float32))
    some = mix(tokens, people, 5, people=2)
    result = add_surrogates(tiny_bundle, some, tmp_path / "b", origin="nobody")
    assert result.fingerprint == tiny_bundle.fingerprint
    assert result.manifest.provenance["surrogates"] == "nobody"
    result.verify(full=True)
    loaded = Surrogates.load(result)
    # float16 has 11 bits; a token is a sum of a few of them.
    every = np.arange(5)
    np.testing.assert_allclose(loaded.tokens(every), some.tokens(every), atol=2**-8)
    np.testing.assert_allclose(loaded.identities, some.identities, atol=2**-11)
    with pytest.raises(OptionError, match="exists"):
        add_surrogates(tiny_bundle, some, tmp_path / "b", origin="nobody")
    other = mix(tokens[:, :, 1:].copy(), people, 5, people=2)
    with pytest.raises(OptionError, match="the bundle has"):
        add_surrogates(tiny_bundle, other, tmp_path / "c", origin="nobody")
    assert not (tmp_path / "c").exists()


def test_the_command(
    tiny_bundle: Bundle,
    tmp_path: Path,
    crops: NDArray[np.uint8],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Noise is all one person to a random recognizer.
    monkeypatch.setattr("diffveil_export.surrogates._SAME_PERSON", 2.0)
    photos, target = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for index, crop in enumerate(crops):
        Image.fromarray(crop).save(photos / f"{index:02}.png")
    words = ["add-surrogates", str(tiny_bundle.path), str(photos), "--aligned", "-o", str(target)]
    assert main([*words, "--count", "6", "--people", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["faces"], record["surrogates"]) == (20, 6)
    assert record["fingerprint"] == tiny_bundle.fingerprint
    assert record["bytes"] == (target / SURROGATES_FILE).stat().st_size
    assert "3 people's faces out of 20" in Bundle.load(target).manifest.provenance["surrogates"]
    assert main([*words, "--count", "2"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*words, "--count", "2", "--force"]) == 0
    assert "surrogates added" in capsys.readouterr().out
    for file in sorted(photos.iterdir())[5:]:
        file.unlink()
    assert main([*words, "--force"]) == 2
    assert "found 5 faces" in capsys.readouterr().err
