from __future__ import annotations

import numpy as np
import pytest

from diffveil import (
    NoFaceError,
    OptionError,
    Photo,
    PhotoError,
    Protector,
)
from diffveil.align import template_for
from diffveil.scenes import aligned_scene, to_images, to_pixels
from fake_photos import ONE, PRESET, TWO, ListedDetector, Pixels, face_at, key_of, smooth_photo


def test_faces_given_by_the_app(
    protector: Protector, detector: ListedDetector, group: Pixels, portrait: Pixels
) -> None:
    mine = [face_at(100, 50)]
    result = protector.anonymize(group, faces=mine, preset=PRESET)
    assert result.faces == tuple(mine)
    assert detector.seen == []
    results = protector.anonymize([group, portrait], faces=[mine, None], preset=PRESET)
    assert [r.faces for r in results] == [tuple(mine), tuple(ONE)]
    assert detector.seen == [(90, 110, 3)]


def test_without_a_face_nothing_is_protected(
    protector: Protector, group: Pixels, rng: np.random.Generator
) -> None:
    landscape = smooth_photo(rng, 30, 40)
    with pytest.raises(NoFaceError, match="no face found in photo 2"):
        protector.anonymize([group, landscape], preset=PRESET)
    with pytest.raises(NoFaceError, match=r"view\.png"):
        protector.hide(Photo(landscape, "view.png"), preset=PRESET)
    with pytest.raises(NoFaceError):
        protector.anonymize(group, faces=[], preset=PRESET)
    with pytest.raises(NoFaceError):
        protector.embed(landscape)


def test_photos_without_faces_can_be_kept(
    protector: Protector, group: Pixels, rng: np.random.Generator
) -> None:
    landscape = smooth_photo(rng, 30, 40)
    kept = protector.anonymize(landscape, preset=PRESET, on_missing="keep", variants=2)
    assert (kept.faces, kept.key, len(kept.images)) == ((), None, 2)
    np.testing.assert_array_equal(kept.image, landscape)
    none, two = protector.anonymize([landscape, group], preset=PRESET, on_missing="keep", seed=1)
    assert none.key is None
    assert len(key_of(two).faces) == 2
    alone = protector.anonymize(group, preset=PRESET, seed=1)
    np.testing.assert_array_equal(two.image, alone.image)
    assert protector.embed(landscape, on_missing="keep").embeddings.shape == (0, 7)


@pytest.mark.parametrize("side", [32, 64, 24])
def test_aligned_photos(protector: Protector, rng: np.random.Generator, side: int) -> None:
    photo = smooth_photo(rng, side, side)
    result = protector.anonymize(photo, aligned=True, preset=PRESET, seed=1)
    (face,) = result.faces
    scale = side / 32
    expected = (template_for(32) + 0.5) * scale - 0.5
    np.testing.assert_allclose(face.landmarks, expected, atol=1e-9)
    change = np.abs(np.asarray(result.image).astype(int) - photo).max(axis=2)
    assert change[0].max() == change[:, -1].max() == 0
    assert change[side // 2, side // 2] > 0
    recovered = np.asarray(protector.recover(result.image, key_of(result)).image).astype(int)
    assert np.abs(recovered - photo).mean() < change.mean()


def test_an_aligned_photo_of_the_bundles_size_is_not_resampled(
    protector: Protector, rng: np.random.Generator
) -> None:

    noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    scene = aligned_scene(Photo(noise), protector.bundle.template, 32)
    np.testing.assert_array_equal(scene.crops[0], noise)
    np.testing.assert_array_equal(to_pixels(to_images(scene.crops)), scene.crops)


def test_aligned_photos_are_square_and_have_no_other_faces(
    protector: Protector, portrait: Pixels
) -> None:
    with pytest.raises(PhotoError, match="110x90 pixels, expected a square"):
        protector.anonymize(portrait, aligned=True)
    with pytest.raises(OptionError, match="give faces or aligned"):
        protector.anonymize(portrait[:, :90], aligned=True, faces=ONE)


def test_a_list_of_faces_is_needed_for_every_photo(protector: Protector, group: Pixels) -> None:
    with pytest.raises(OptionError, match="received 1 lists for 2 photos"):
        protector.anonymize([group, group], faces=[TWO])


def test_what_is_no_photo_is_refused(protector: Protector) -> None:
    with pytest.raises(PhotoError, match="received int"):
        protector.anonymize(7)  # type: ignore[call-overload]
    with pytest.raises(PhotoError):
        protector.anonymize("no/such/photo.jpg")


def test_what_a_photo_carries_comes_along(protector: Protector, portrait: Pixels) -> None:
    alpha = np.full(portrait.shape[:2], 128, np.uint8)
    result = protector.anonymize(np.dstack([portrait, alpha]), preset=PRESET)
    assert result.image.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(result.image)[..., 3], alpha)
