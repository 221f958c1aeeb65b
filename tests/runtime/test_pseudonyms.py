from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffveil import NoiseKey, OptionError, Protector
from diffveil.operations import FaceOperations
from diffveil.presets import PSEUDONYM
from diffveil.pseudonyms import Pseudonyms, code_of, nearest
from fake_photos import Pixels, key_of
from fake_programs import fake_programs

SECRET = bytes(range(32))


def unit(rng: np.random.Generator, count: int, width: int = 7) -> np.ndarray:
    vectors = rng.standard_normal((count, width)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def test_faces_are_quantised_to_people(rng: np.random.Generator) -> None:
    axes = np.eye(7, dtype=np.float32)
    people = {"Ada": axes[0], "Bo": axes[1:3], "Cy": axes[3]}
    faces = axes[[3, 0, 2, 1]] + 0.1 * unit(rng, 4)
    assert nearest(faces, people, 0.5) == [code_of(name) for name in ("Cy", "Ada", "Bo", "Bo")]
    # Whoever is not enrolled is somebody too, and the same one the second time.
    strangers = axes[[5, 6, 5]]
    codes = nearest(strangers, people, 0.5)
    assert codes == [code_of(axes[5]), code_of(axes[6]), code_of(axes[5])]
    assert nearest(strangers, {}, 0.5) == codes
    assert nearest(np.empty((0, 7), dtype=np.float32), people, 0.5) == []
    assert len({*codes, *map(code_of, people)}) == 5


def test_people_of_another_shape_are_an_error() -> None:
    faces = np.eye(7, dtype=np.float32)
    for wrong in (np.zeros(6), np.zeros((2, 6)), np.zeros((1, 2, 7)), np.full((1, 7), np.nan)):
        with pytest.raises(OptionError, match=r"as Protector\.embed gives them"):
            nearest(faces, {"Ada": wrong.astype(np.float32)}, 0.5)


def test_a_decoy_is_of_secret_and_code(tmp_path: Path) -> None:
    operations = FaceOperations(fake_programs(tmp_path))
    one = Pseudonyms(operations, NoiseKey.from_seed(1))
    decoys = one.decoys([5, 9])
    np.testing.assert_allclose(np.linalg.norm(decoys, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(one.decoys([9]), decoys[1:], atol=1e-5)
    other = Pseudonyms(operations, NoiseKey.from_seed(2)).decoys([5, 9])
    assert np.abs(other - decoys).max() > 0.1
    assert np.abs(decoys[0] - decoys[1]).max() > 0.1


def test_faces_are_led_to_the_decoy(tmp_path: Path, rng: np.random.Generator) -> None:
    operations = FaceOperations(fake_programs(tmp_path))
    faces = operations.prepare(rng.uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32))
    pseudonyms = Pseudonyms(operations, NoiseKey.from_seed(1))
    drawn = pseudonyms.draw(faces, [4, 8, 4])
    assert drawn.shape == (3, 3, 32, 32)
    seen = operations.embed(drawn)
    decoys = pseudonyms.decoys([4, 8])
    for row, decoy in zip(seen, decoys[[0, 1, 0]], strict=True):
        assert row @ decoy > 0.3
    assert seen[0] @ seen[2] > seen[0] @ seen[1]
    # The photo decides nothing but what lies around the face.
    again = pseudonyms.draw(operations.prepare(faces.crops[:1]), [4])
    np.testing.assert_allclose(again[0], drawn[0], atol=1e-4)


def test_anchors_must_fit(tmp_path: Path) -> None:
    operations = FaceOperations(fake_programs(tmp_path))
    crops = np.zeros((2, 3, 32, 32), dtype=np.float32)
    keys = [NoiseKey.from_seed(1)] * 2
    with pytest.raises(OptionError, match="expected one for each of 2 faces, 7 wide"):
        operations.disguise(crops, PSEUDONYM, anchors=np.zeros((1, 7), np.float32), keys=keys)


def test_whole_photos(protector: Protector, portrait: Pixels, group: Pixels) -> None:
    people = dict(zip(("Ada", "Bo"), protector.embed(group).embeddings, strict=True))
    options = {"pseudonym": SECRET, "people": people}
    result = protector.anonymize(group, **options)  # type: ignore[arg-type]
    again = protector.anonymize([portrait, group], **options)[1]  # type: ignore[arg-type]
    assert np.abs(np.asarray(result).astype(int) - np.asarray(again)).max() <= 1
    other = protector.anonymize(group, pseudonym=bytes(32), people=people)
    assert np.abs(np.asarray(result).astype(int) - np.asarray(other)).max() > 8
    back = protector.recover(result.image, key_of(result))
    error = np.abs(np.asarray(back).astype(int) - group).mean()
    assert error < np.abs(np.asarray(result).astype(int) - group).mean()
    assert protector.anonymize(group, pseudonym=SECRET, make_key=False).key is None


def test_what_does_not_go_together(protector: Protector, portrait: Pixels) -> None:
    with pytest.raises(OptionError, match="do not apply"):
        protector.anonymize(portrait, pseudonym=SECRET, seed=3)
    with pytest.raises(OptionError, match="not both"):
        protector.anonymize(portrait, pseudonym=SECRET, carry=True, secret=SECRET)
    with pytest.raises(OptionError, match="they are for pseudonym"):
        protector.anonymize(portrait, people={"Ada": np.zeros(7, np.float32)})
