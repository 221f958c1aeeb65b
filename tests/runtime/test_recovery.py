from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffveil import (
    KeyMismatchError,
    OptionError,
    PhotoError,
    Protector,
    RecoveryKey,
    generate_identity,
)
from diffveil.align import crop_face, paste_faces, similarity
from diffveil.masks import recovery_mask
from diffveil.plans import Inversion
from diffveil.scenes import to_images, to_pixels
from fake_photos import ONE, PRESET, TWO, ListedDetector, Pixels, key_of
from fake_programs import fake_programs


def test_recover_brings_the_faces_back(protector: Protector, group: Pixels) -> None:
    result = protector.anonymize(group, preset=PRESET, seed=1)
    recovered = protector.recover(result.image, key_of(result))
    assert recovered.key is None
    assert recovered.preset is None
    assert len(recovered.faces) == 2
    # By hand: what encoding and decoding leaves of each crop, pasted into the original.
    template = protector.bundle.template
    matrices = [similarity(face.landmarks, template) for face in TWO]
    crops = np.stack([crop_face(group, matrix, 32) for matrix in matrices])
    latents = protector.programs.encode(image=to_images(crops))
    round_trip = to_pixels(np.clip(protector.programs.decode(latent=latents), -1, 1))
    mask = recovery_mask(32, template)
    expected = paste_faces(group, list(round_trip), matrices, mask, match_colour=False)
    difference = np.abs(np.asarray(recovered.image).astype(int) - expected)
    # A level of rounding, one for latents in float16; nothing of the protected face, which differs
    # by tens of levels.
    assert difference.max() <= 2


def test_hide_can_be_recovered_too(protector: Protector, portrait: Pixels) -> None:
    result = protector.hide(portrait, preset=PRESET, seed=1)
    protected = np.asarray(result.image).astype(int)
    recovered = np.asarray(protector.recover(result.image, key_of(result)).image).astype(int)
    assert np.abs(protected - portrait).mean() > 2 * np.abs(recovered - portrait).mean()


def test_a_key_survives_sealing(protector: Protector, portrait: Pixels, tmp_path: Path) -> None:
    result = protector.anonymize(portrait, preset=PRESET, seed=1)
    recipient, identity = generate_identity()
    key_of(result).seal(tmp_path / "a.veilkey", recipients=[recipient])
    result.save(tmp_path / "a.png")
    key = RecoveryKey.unseal(tmp_path / "a.veilkey", identity=identity)
    again = protector.recover(tmp_path / "a.png", key)
    direct = protector.recover(result.image, key_of(result))
    np.testing.assert_array_equal(again.image, direct.image)


def test_keys_of_different_samplers_recover_in_one_call(
    protector: Protector, group: Pixels, portrait: Pixels
) -> None:
    exact = protector.anonymize(group, preset=PRESET, seed=5)
    other = replace(PRESET, recovery=Inversion("ddim", 30))
    rough = protector.anonymize(portrait, preset=other, seed=5)
    seen: list[tuple[int, int]] = []
    both = protector.recover(
        [rough.image, exact.image, rough.image],
        [key_of(rough), key_of(exact), key_of(rough)],
        progress=lambda *state: seen.append(state),
    )
    assert seen == [(i, 32) for i in range(1, 33)]
    np.testing.assert_array_equal(
        both[1].image, protector.recover(exact.image, key_of(exact)).image
    )
    np.testing.assert_array_equal(both[0].image, both[2].image)


def test_the_key_says_what_made_it(protector: Protector, portrait: Pixels) -> None:
    key = key_of(protector.anonymize(portrait, preset=PRESET))
    assert key.bundle == protector.bundle.fingerprint
    assert (key.sampler, key.steps, key.photo_size) == ("o-belm", 3, (90, 110))
    assert (key.backend, key.precision) == ("fake", "float32")
    assert key.faces[0].box == ONE[0].box
    np.testing.assert_array_equal(key.faces[0].landmarks, ONE[0].landmarks)


def test_foreign_keys_are_refused(
    protector: Protector, portrait: Pixels, group: Pixels, tmp_path: Path
) -> None:
    result = protector.anonymize(portrait, preset=PRESET)
    key = key_of(result)
    other = Protector(fake_programs(tmp_path / "other", name="other"))
    with pytest.raises(KeyMismatchError, match="load the bundle that protected the photo"):
        other.recover(result.image, key)
    with pytest.raises(KeyMismatchError, match="110x90 pixels, but 'photo' has 160x100"):
        protector.recover(group, key)
    latents = np.ones((2, 8, 5, 5), np.float32)
    face = key.faces[0]
    shaped = replace(key, faces=(replace(face, latents=latents),))
    with pytest.raises(KeyMismatchError, match="shapes of bundle 'fake'"):
        protector.recover(result.image, shaped)
    with pytest.raises(KeyMismatchError, match="cannot be used with this bundle"):
        protector.recover(result.image, replace(key, steps=1000))


def test_recover_needs_one_key_a_photo(protector: Protector, portrait: Pixels) -> None:
    result = protector.anonymize(portrait, preset=PRESET)
    with pytest.raises(OptionError, match="1 keys for 2 photos"):
        protector.recover([portrait, portrait], [key_of(result)])
    with pytest.raises(OptionError, match="received str, expected a RecoveryKey"):
        protector.recover(portrait, "portrait.veilkey")  # type: ignore[call-overload]
    with pytest.raises(PhotoError, match="received int"):
        protector.recover(7, key_of(result))  # type: ignore[call-overload]


def test_a_real_bundle_from_photo_to_photo(
    tiny_bundle_path: Path, detector: ListedDetector, group: Pixels, tmp_path: Path
) -> None:
    with Protector.load(tiny_bundle_path, backend="cpu", detector=detector, threads=1) as protector:
        result = protector.anonymize(group, variants=2, steps=4, seed=3)
        recipient, identity = generate_identity()
        key_of(result).seal(tmp_path / "group.veilkey", recipients=[recipient])
        path = result.save(tmp_path / "group.png", variant=1)
        key = RecoveryKey.unseal(tmp_path / "group.veilkey", identity=identity)
        recovered = np.asarray(protector.recover(path, key).image)
        # By hand, with random weights a poor likeness: the round trip of each crop.
        matrices = [face.matrix for face in key.faces]
        crops = np.stack([crop_face(group, matrix, 32) for matrix in matrices])
        latents = protector.programs.encode(image=to_images(crops))
        round_trip = to_pixels(protector.programs.decode(latent=latents))
    mask = recovery_mask(32, protector.bundle.template)
    expected = paste_faces(group, list(round_trip), matrices, mask, match_colour=False)
    assert np.abs(recovered.astype(int) - expected).max() <= 1
