from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffveil import (
    BackendUnavailableError,
    BundleError,
    Face,
    NoiseKey,
    OptionError,
    Photo,
    Protector,
    load_photo,
)
from diffveil.align import paste_face, similarity
from diffveil.detectors import CenterFace
from diffveil.masks import fitted_mask
from diffveil.protection import Operation, Protection
from diffveil.scenes import Scene
from fake_photos import ONE, PRESET, TWO, ListedDetector, Pixels, face_at, key_of


def test_anonymize_changes_the_faces_and_nothing_else(protector: Protector, group: Pixels) -> None:
    result = protector.anonymize(group, preset=PRESET, seed=1)
    assert result.faces == tuple(TWO)
    assert (result.backend, result.preset) == ("fake", PRESET.name)
    assert result.seconds > 0
    assert result.image.size == (160, 100)
    change = np.abs(np.asarray(result.image).astype(int) - group).max(axis=2)
    y, x = np.mgrid[:100, :160]
    for face in TWO:
        cx, cy = face.landmarks.mean(axis=0)
        assert change[int(cy), int(cx)] > 0
    distance = np.minimum(np.hypot(x - 40, y - 50) / 40, np.hypot(x - 120, y - 60) / 56)
    assert change[distance > 0.75].max() == 0
    assert change[distance < 0.2].mean() > 3


@pytest.mark.parametrize("operation", ["anonymize", "hide"])
def test_beside_a_turned_head_the_photo_stays(
    protector: Protector, group: Pixels, operation: Operation
) -> None:
    """Faces are pasted up to the far cheek, each with the mask that is its own."""
    front, other = TWO
    points = front.landmarks.copy()
    points[2] += 0.4 * (points[1] - points[0])
    aside = Face(front.box, points)
    act = getattr(protector, operation)
    result = act(group, faces=[aside, other], preset=PRESET, seed=1)
    template, covered = protector.bundle.template, []
    for face in (aside, other):
        matrix = similarity(face.landmarks, template)
        mask = fitted_mask(32, template, face.landmarks @ matrix[:, :2].T + matrix[:, 2])
        white, black = np.full((32, 32, 3), 255, np.uint8), np.zeros_like(group)
        covered.append(paste_face(black, white, matrix, mask, match_colour=False).any(axis=2))
    changed = (np.asarray(result.image) != group).any(axis=2)
    assert changed.any()
    assert not (changed & ~(covered[0] | covered[1])).any()


def test_a_batch_equals_single_photos_in_any_order(
    protector: Protector, group: Pixels, portrait: Pixels
) -> None:
    photos = [group, portrait, group[:, ::-1].copy()]
    together = protector.anonymize(photos, preset=PRESET, seed=5)
    backwards = protector.anonymize(photos[::-1], preset=PRESET, seed=5)[::-1]
    alone = [protector.anonymize(photo, preset=PRESET, seed=5) for photo in photos]
    for one, two, three in zip(together, backwards, alone, strict=True):
        for other in (two, three):
            difference = np.asarray(one.image).astype(int) - np.asarray(other.image)
            assert np.abs(difference).max() <= 1
    recovered = protector.recover([r.image for r in together], [key_of(r) for r in together])
    for result, other in zip(recovered, alone, strict=True):
        single = protector.recover(other.image, key_of(other))
        difference = np.asarray(result.image).astype(int) - np.asarray(single.image)
        assert np.abs(difference).max() <= 1


def test_a_seed_reproduces_and_its_absence_does_not(protector: Protector, portrait: Pixels) -> None:
    def image(seed: int | NoiseKey | None) -> Pixels:
        return np.asarray(protector.anonymize(portrait, preset=PRESET, seed=seed).image)

    np.testing.assert_array_equal(image(7), image(7))
    np.testing.assert_array_equal(image(7), image(NoiseKey.from_seed(7)))
    assert (image(7) != image(8)).any()
    assert (image(None) != image(None)).any()


def test_photos_and_operations_have_noise_of_their_own(
    protector: Protector, portrait: Pixels
) -> None:

    def keys(operation: Operation, pixels: Pixels, name: str = "") -> list[NoiseKey]:
        protection = Protection.choose(
            operation,
            preset=None,
            steps=None,
            strength=None,
            variants=1,
            seed=3,
            make_key=False,
        )
        scene = Scene.cut(Photo(pixels, name), ONE * 2, protector.bundle.template, 32)
        return list(protection.noise_keys(scene))

    base = keys("anonymize", portrait)
    other = portrait.copy()
    other[0, 0, 0] ^= 1
    assert base == keys("anonymize", portrait, "another name")
    everything = [*base, *keys("hide", portrait), *keys("anonymize", other)]
    everything += keys("anonymize", portrait.reshape(110, 90, 3))
    assert len(set(everything)) == 8


def test_variants(protector: Protector, group: Pixels) -> None:
    result = protector.anonymize(group, preset=PRESET, variants=3, seed=2)
    assert len(result.images) == 3
    assert result.image is result.images[0]
    arrays = [np.asarray(image).astype(int) for image in result.images]
    for i in range(3):
        for j in range(i):
            assert np.abs(arrays[i] - arrays[j]).max() > 10
    # One key serves all variants: it holds the original.
    recovered = [np.asarray(protector.recover(i, key_of(result)).image) for i in result.images]
    np.testing.assert_array_equal(recovered[0], recovered[2])


def test_no_photos_no_results(protector: Protector) -> None:
    assert protector.anonymize([], preset=PRESET) == []
    assert protector.embed([]) == []
    assert protector.recover([], []) == []


def test_embed_matches_faces(protector: Protector, group: Pixels) -> None:
    found = protector.embed(group)
    assert found.faces == tuple(TWO)
    assert found.embeddings.shape == (2, 7)
    assert found.embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.embeddings, axis=1), 1.0, rtol=1e-5)
    second, both = protector.embed([group, group], faces=[TWO[1:], None])
    np.testing.assert_allclose(second.embeddings[0], found.embeddings[1], rtol=1e-5)
    np.testing.assert_allclose(both.embeddings, found.embeddings, rtol=1e-5)


def test_no_key_is_made_unless_asked_for(protector: Protector, portrait: Pixels) -> None:
    seen: list[tuple[int, int]] = []
    result = protector.anonymize(
        portrait, preset=PRESET, make_key=False, progress=lambda *state: seen.append(state)
    )
    assert result.key is None
    assert seen == [(1, 2), (2, 2)]


def test_progress_covers_the_whole_call(
    protector: Protector, portrait: Pixels, group: Pixels
) -> None:
    seen: list[tuple[int, int]] = []
    protector.anonymize(
        [portrait, group], preset=PRESET, progress=lambda *state: seen.append(state)
    )
    assert seen == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": 0}, "variants is 0"),
        ({"variants": 33}, "variants is 33"),
        ({"preset": "best"}, "preset is 'best'"),
        ({"steps": 0}, "steps is 0"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"seed": -1}, "seed is out of range"),
        ({"on_missing": "ignore"}, "on_missing is 'ignore'"),
        ({"faces": [(1, 2, 3, 4)]}, "received tuple, expected"),
        ({"faces": [face_at(5000, 5000)]}, "outside the photo"),
    ],
)
def test_options_are_checked(
    protector: Protector, portrait: Pixels, options: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        protector.anonymize(portrait, **options)  # type: ignore[call-overload]


def test_steps_and_strength_replace_the_presets(protector: Protector, portrait: Pixels) -> None:
    seen: list[tuple[int, int]] = []
    protector.anonymize(
        portrait,
        preset="fast",
        steps=6,
        strength=0.5,
        make_key=False,
        progress=lambda *state: seen.append(state),
    )
    assert seen[-1] == (3, 3)


def test_results_are_saved(protector: Protector, portrait: Pixels, tmp_path: Path) -> None:
    result = protector.anonymize(portrait, preset=PRESET, variants=2)
    path = result.save(tmp_path / "b.png", variant=1)
    np.testing.assert_array_equal(load_photo(path).pixels, np.asarray(result.images[1]))
    with pytest.raises(OptionError, match="variant is 2"):
        result.save(tmp_path / "c.png", variant=2)
    assert not (tmp_path / "c.png").exists()


def test_results_do_not_print_what_they_hold(protector: Protector, portrait: Pixels) -> None:
    result = protector.anonymize(portrait, preset=PRESET)
    assert "array" not in repr(result.key)
    assert "key" not in repr(result)
    assert "embeddings" not in repr(protector.embed(portrait))


def test_load_reports_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        Protector.load(tmp_path)


def test_load_names_backends(protector: Protector) -> None:
    with pytest.raises(OptionError, match="'warp'"):
        Protector.load(protector.bundle, backend="warp")


def test_load_takes_what_the_app_has(protector: Protector, detector: ListedDetector) -> None:
    backend = protector.programs.backend
    with Protector.load(protector.bundle, backend=backend, detector=detector) as loaded:
        assert loaded.backend == "fake"
        assert loaded.detector is detector
        assert loaded.bundle is protector.bundle


def test_the_default_detector_is_loaded_when_needed(
    protector: Protector, portrait: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:

    loads: list[int | None] = []

    def load(threads: int | None = None) -> ListedDetector:
        loads.append(threads)
        if len(loads) == 1:
            raise BackendUnavailableError("not installed")
        return ListedDetector({(90, 110): ONE})

    monkeypatch.setattr(CenterFace, "load", load)
    lazy = Protector(protector.programs, threads=2)
    lazy.embed(portrait, faces=ONE)
    assert loads == []
    with pytest.raises(BackendUnavailableError):
        lazy.embed(portrait)
    for _ in range(2):
        assert lazy.embed(portrait).faces == tuple(ONE)
    assert loads == [2, 2]
