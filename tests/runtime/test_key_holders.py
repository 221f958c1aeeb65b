"""One face of a group to one holder: keys split, joined, resealed, and held to their picture."""

from __future__ import annotations

import dataclasses
import io
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffveil import (
    KeyFileError,
    KeyMismatchError,
    OptionError,
    Protector,
    RecoveryKey,
    Result,
    WrongSecretError,
    generate_identity,
    inspect_keyfile,
    reseal,
)
from fake_photos import PRESET, Pixels, key_of
from key_samples import make_face, make_key


@pytest.fixture
def key(rng: np.random.Generator) -> RecoveryKey:
    return make_key(rng, faces=tuple(make_face(rng, number=n) for n in range(3)))


@pytest.fixture
def result(protector: Protector, group: Pixels) -> Result:
    return protector.anonymize(group, preset=PRESET, variants=2, seed=1)


def levels(image: Image.Image | Pixels) -> np.ndarray:
    return np.asarray(image).astype(int)


# ---- split, select, join


def test_parts_are_keys_of_one_face_and_join_to_the_whole(key: RecoveryKey) -> None:
    parts = key.split()
    assert [part.faces for part in parts] == [(face,) for face in key.faces]
    assert RecoveryKey.join(parts) == key
    assert RecoveryKey.join([*parts[::-1], key]) == key  # in any order, faces counted once
    assert RecoveryKey.join([key.select([2, 0])]).faces == (key.faces[0], key.faces[2])
    assert [face.number for face in key.select([2, 0, 2]).faces] == [2, 0]


@pytest.mark.parametrize("numbers", [[3], [-1], [0, 7], []])
def test_a_face_that_is_not_there_cannot_be_selected(key: RecoveryKey, numbers: list[int]) -> None:
    with pytest.raises(OptionError, match="holds the faces 0, 1, 2"):
        key.select(numbers)


def test_keys_of_different_photos_do_not_join(key: RecoveryKey, rng: np.random.Generator) -> None:
    one, two = key.select([0]), key.select([1])
    for changes in ({"steps": 9}, {"bundle": "ab" * 32}, {"photo_size": (640, 480)}):
        (name,) = changes
        with pytest.raises(KeyMismatchError, match=f"key 2 .*{name}"):
            RecoveryKey.join([one, dataclasses.replace(two, **changes)])
    with pytest.raises(KeyMismatchError, match="another picture"):
        RecoveryKey.join([one, dataclasses.replace(two, pictures=make_key(rng).pictures)])
    other = dataclasses.replace(one, faces=(make_face(rng),))
    with pytest.raises(KeyMismatchError, match="another face 0"):
        RecoveryKey.join([one, other])
    with pytest.raises(OptionError, match="no key"):
        RecoveryKey.join([])


def test_joined_keys_share_one_picture_and_keep_all(
    key: RecoveryKey, rng: np.random.Generator
) -> None:
    extra = make_key(rng).pictures
    more = dataclasses.replace(key.select([1]), pictures=(*key.pictures, *extra))
    assert RecoveryKey.join([key.select([0]), more]).pictures == (*key.pictures, *extra)


# ---- one holder, one face


def test_a_holder_recovers_one_face_and_the_other_stays_protected(
    protector: Protector, result: Result
) -> None:
    holders = [generate_identity() for _ in range(2)]
    files = [
        part.seal_bytes(recipients=[recipient])
        for part, (recipient, _) in zip(key_of(result).split(), holders, strict=True)
    ]
    for mine, (_, identity) in enumerate(holders):
        with pytest.raises(WrongSecretError):
            RecoveryKey.unseal(files[1 - mine], identity=identity)
    protected = levels(result.image)
    whole = levels(protector.recover(result.image, key_of(result)).image)
    halves = np.s_[:, :75], np.s_[:, 85:]  # one face lies in each
    for mine, (_, identity) in enumerate(holders):
        key = RecoveryKey.unseal(files[mine], identity=identity)
        recovered = protector.recover(result.image, key)
        assert [face.box for face in recovered.faces] == [key_of(result).faces[mine].box]
        seen = levels(recovered.image)
        np.testing.assert_array_equal(seen[halves[mine]], whole[halves[mine]])
        np.testing.assert_array_equal(seen[halves[1 - mine]], protected[halves[1 - mine]])
        assert np.abs(seen - protected).max() > 10


def test_two_holders_recover_together_or_one_after_the_other(
    protector: Protector, result: Result
) -> None:
    one, two = key_of(result).split()
    whole = protector.recover(result.image, key_of(result)).image
    together = protector.recover(result.image, RecoveryKey.join([two, one])).image
    np.testing.assert_array_equal(together, whole)
    first = protector.recover(result.image, one).image
    with pytest.raises(KeyMismatchError, match="another picture"):
        protector.recover(first, two)
    second = protector.recover(first, two, reencoded=True).image
    np.testing.assert_array_equal(second, whole)


def test_swapped_faces_are_found_out(protector: Protector, result: Result, group: Pixels) -> None:
    """Key-I of one face under the number of another: another face, which `join` notices."""
    one, two = key_of(result).split()
    swapped = dataclasses.replace(
        one, faces=(dataclasses.replace(one.faces[0], latents=two.faces[0].latents),)
    )
    with pytest.raises(KeyMismatchError, match="another face 0"):
        RecoveryKey.join([key_of(result), swapped])
    foreign = key_of(protector.anonymize(255 - group, preset=PRESET, seed=1)).select([1])
    with pytest.raises(KeyMismatchError, match="another picture"):
        RecoveryKey.join([one, foreign])


# ---- the picture


def test_every_variant_and_every_lossless_copy_is_the_picture(
    protector: Protector, result: Result, tmp_path: Path
) -> None:
    key = key_of(result)
    assert len(result.images) == 2
    for image in result.images:
        expected = protector.recover(image, key).image
        for suffix in ("png", "webp", "tiff", "bmp"):
            path = tmp_path / f"copy.{suffix}"
            image.save(path, **({"lossless": True} if suffix == "webp" else {}))
            np.testing.assert_array_equal(protector.recover(path, key).image, expected)


@pytest.mark.parametrize("change", ["one level", "replay", "swap channels", "mirror"])
def test_another_picture_is_a_mismatch(
    protector: Protector, result: Result, group: Pixels, change: str
) -> None:
    other = np.array(result.image)
    if change == "one level":
        other[50, 80, 1] ^= 1
    elif change == "replay":
        other = np.asarray(protector.anonymize(255 - group, preset=PRESET, seed=1).image)
    elif change == "swap channels":
        other = other[..., ::-1]
    else:
        other = other[:, ::-1]
    with pytest.raises(KeyMismatchError, match="reencoded=True"):
        protector.recover(other, key_of(result))
    if change == "one level":
        protector.recover(other, key_of(result), reencoded=True)
    else:  # the override is for the same picture, not for any
        with pytest.raises(KeyMismatchError, match="does not even look like"):
            protector.recover(other, key_of(result), reencoded=True)


@pytest.mark.parametrize("quality", [95, 50, 20])
def test_a_reencoded_picture_needs_the_override(
    protector: Protector, result: Result, quality: int
) -> None:
    file = io.BytesIO()
    result.image.save(file, "JPEG", quality=quality)
    with pytest.raises(KeyMismatchError, match="reencoded=True"):
        protector.recover(file.getvalue(), key_of(result))
    recovered = protector.recover(file.getvalue(), key_of(result), reencoded=True).image
    exact = protector.recover(result.image, key_of(result)).image
    assert np.abs(levels(recovered) - levels(exact)).mean() < 8


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_what_the_result_saves_is_the_picture(
    protector: Protector, result: Result, tmp_path: Path, suffix: str
) -> None:
    path = result.save(tmp_path / f"a.{suffix}", variant=1, quality=70)
    protector.recover(path, key_of(result))
    assert len(key_of(result).pictures) == (2 if suffix == "png" else 3)
    encoded = result.encode(f"b.{suffix}", variant=1, quality=70)
    assert encoded == path.read_bytes()
    assert len(key_of(result).pictures) == (2 if suffix == "png" else 3)


def test_saving_for_ever_keeps_the_newest_pictures(result: Result) -> None:
    before = key_of(result)
    many = tuple(
        dataclasses.replace(before.pictures[0], digest=bytes([i] * 32)) for i in range(256)
    )
    object.__setattr__(result, "key", dataclasses.replace(before, pictures=many))
    result.encode("a.jpg")
    kept = key_of(result).pictures
    assert len(kept) == 256
    assert kept[:-1] == many[1:]
    assert kept[-1] not in before.pictures


def test_a_wiped_key_recovers_nothing(protector: Protector, result: Result) -> None:
    key_of(result).wipe()
    with pytest.raises(OptionError, match="wiped"):
        protector.recover(result.image, key_of(result))


# ---- compact


def test_codes_are_kept_in_half_precision(result: Result) -> None:
    for face in key_of(result).faces:
        assert face.tokens.dtype == face.latents.dtype == np.float16


def test_a_noise_map_that_ran_away_is_kept_whole() -> None:
    from diffveil.keychecks import compact, compact_noise

    noise = np.random.default_rng(3).standard_normal((2, 2, 3, 4, 4)).astype(np.float32)
    assert compact_noise(noise).dtype == np.float16
    noise[1, 0] *= 3
    assert compact_noise(noise).dtype == np.float32
    assert compact(np.float32([1, 65520])).dtype == np.float32
    assert compact(np.float32([1, 65504])).dtype == np.float16


# ---- reseal


def test_recipients_are_added_and_removed(key: RecoveryKey, tmp_path: Path) -> None:
    (a, a_secret), (b, b_secret), (c, c_secret) = (generate_identity() for _ in range(3))
    path = tmp_path / "k.veilkey"
    key.seal(path, recipients=[a, b])
    old = path.read_bytes()
    assert reseal(path, identity=a_secret, add=[c, a], remove=[b]) == (a, c)
    assert inspect_keyfile(path)["recipients"] == {"X25519": 2}
    for identity in (a_secret, c_secret):
        opened = RecoveryKey.unseal(path, identity=identity)
        assert opened == key
        assert opened.recipients == (a, c)
    with pytest.raises(WrongSecretError):
        RecoveryKey.unseal(path, identity=b_secret)
    RecoveryKey.unseal(old, identity=b_secret)  # nobody can call back a copy
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_file_changes_from_recipients_to_a_passphrase_and_back(
    key: RecoveryKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyrage

    import age_reference as age

    # Real scrypt takes a second; another implementation of age reads what this one writes.
    monkeypatch.setattr(pyrage.passphrase, "encrypt", age.seal_scrypt)
    a, identity = generate_identity()
    path, new = tmp_path / "k.veilkey", tmp_path / "new.veilkey"
    key.seal(path, recipients=[a])
    passphrase = "four entirely random words"
    assert reseal(path, identity=identity, new_passphrase=passphrase, target=new) == ()
    assert RecoveryKey.unseal(path, identity=identity) == key
    assert RecoveryKey.unseal(new, passphrase=passphrase) == key
    with pytest.raises(OptionError, match="fewer than 8"):
        reseal(new, passphrase=passphrase, new_passphrase="weak")
    with pytest.raises(OptionError, match="names no recipients"):
        reseal(new, passphrase=passphrase, add=[a])
    reseal(new, passphrase=passphrase, recipients=[a])
    assert RecoveryKey.unseal(new, identity=identity) == key


def test_what_cannot_be_resealed_stays_as_it_is(key: RecoveryKey, tmp_path: Path) -> None:
    (a, identity), (b, _) = generate_identity(), generate_identity()
    path = tmp_path / "k.veilkey"
    key.seal(path, recipients=[a])
    before = path.read_bytes()
    for error, options in [
        (OptionError, {"add": [b], "recipients": [b]}),
        (OptionError, {}),
        (OptionError, {"remove": [b]}),
        (OptionError, {"remove": [a]}),
        (OptionError, {"add": ["age1nonsense"]}),
        (OptionError, {"recipients": []}),
        (OptionError, {"recipients": [b], "target": path}),
        (KeyFileError, {"recipients": [b], "target": tmp_path / "none" / "k"}),
    ]:
        with pytest.raises(error):
            reseal(path, identity=identity, **options)  # type: ignore[arg-type]
        assert path.read_bytes() == before
    with pytest.raises(WrongSecretError):
        reseal(path, identity=generate_identity()[1], recipients=[b])
    assert os.listdir(tmp_path) == ["k.veilkey"]
