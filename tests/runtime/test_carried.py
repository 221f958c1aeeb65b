from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffveil import Face, NoFaceError, OptionError, Protector
from diffveil.carrying import CarriedFaces
from diffveil.engines import Programs
from diffveil.masks import cell_mask, smoothed_over
from diffveil.noise import NoiseKey
from diffveil.operations import FaceOperations
from diffveil.secretkeys import secret_key
from fake_photos import ListedDetector, Pixels
from fake_programs import FakeBackend, fake_programs

SECRET = bytes(range(32))


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return fake_programs(tmp_path)


def cellular(rng: np.random.Generator, count: int) -> np.ndarray:
    """Crops that the fakes' autoencoder keeps: one colour a cell."""
    cells = rng.uniform(-0.5, 0.5, (count, 3, 4, 4)).astype(np.float32)
    return cells.repeat(8, axis=2).repeat(8, axis=3)


def keys(count: int, seed: int = 1) -> list[NoiseKey]:
    return [NoiseKey.from_seed(seed).derive("face", index) for index in range(count)]


def inside(carrier: CarriedFaces) -> np.ndarray:
    return np.asarray(carrier.mask >= 1.0)


def test_every_step_of_the_flow_is_undone(programs: Programs, rng: np.random.Generator) -> None:
    carrier = CarriedFaces(FaceOperations(programs))
    crops = cellular(rng, 2)
    flow = carrier._flow(crops, None)
    latents = flow.clamped(programs.encode(image=crops), flow.clean)
    noise = flow.up(latents)
    assert np.abs(noise - latents).max() > 0.1
    # The fakes' denoiser is a contraction; what is left is what six iterations leave.
    np.testing.assert_allclose(flow.down(noise), latents, atol=2e-2)


def test_a_face_comes_back_with_its_key_only(programs: Programs, rng: np.random.Generator) -> None:
    backend = programs.backend
    assert isinstance(backend, FakeBackend)
    # An autoencoder that keeps every latent exactly, so that only the carrying is tested.
    mix = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    held: dict[bytes, np.ndarray] = {}

    def decode(latent: np.ndarray) -> dict[str, np.ndarray]:
        image = np.einsum("ck,bkhw->bchw", mix[:3], latent).repeat(8, 2).repeat(8, 3) / 16
        for one, picture in zip(latent, image.astype(np.float32), strict=True):
            held[np.clip(picture, -1, 1)[:, 8:24, 8:24].tobytes()] = one
        return {"image": image}

    def encode(image: np.ndarray) -> dict[str, np.ndarray]:
        means = image.reshape(-1, 3, 4, 8, 4, 8).mean(axis=(3, 5)) * 16
        plain = np.einsum("ck,bchw->bkhw", mix[:3], means)
        found = [held.get(p[:, 8:24, 8:24].tobytes(), z) for p, z in zip(image, plain, strict=True)]
        return {"latent": np.stack(found)}

    backend.overrides |= {"decode": decode, "encode": encode}
    carrier = CarriedFaces(FaceOperations(programs))
    crops = cellular(rng, 2)
    mask = inside(carrier)
    shown = carrier.conceal(crops, keys(2))
    photo = np.where(mask, shown, crops)
    right = np.where(mask, carrier.reveal(photo, keys(2)), crops)
    wrong = np.where(mask, carrier.reveal(photo, keys(2, seed=2)), crops)
    swapped = np.where(mask, carrier.reveal(photo, keys(2)[::-1]), crops)

    def error(images: np.ndarray) -> float:
        return float(np.abs(images - crops)[..., mask].mean())

    assert error(right) < 0.3 * min(error(photo), error(wrong), error(swapped))


def test_surroundings_do_not_depend_on_the_face(rng: np.random.Generator) -> None:
    mask = cell_mask(np.pad(np.ones((2, 2), dtype=bool), 1), 32)
    assert mask[8:24, 8:24].min() == 1.0
    assert mask[[0, -1]].max() == mask[:, [0, -1]].max() == 0.0
    crops = rng.uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    other = np.where(mask > 0, 0.3, crops).astype(np.float32)
    np.testing.assert_array_equal(smoothed_over(crops, mask), smoothed_over(other, mask))
    outside = np.broadcast_to(mask <= 0, crops.shape)
    np.testing.assert_array_equal(smoothed_over(crops, mask)[outside], crops[outside])
    flat = np.full((1, 3, 32, 32), 0.25, dtype=np.float32)
    np.testing.assert_allclose(smoothed_over(flat, mask), flat, atol=1e-6)


def test_whole_photos(protector: Protector, group: Pixels, portrait: Pixels) -> None:
    both = protector.anonymize([group, portrait], carry=True, secret=SECRET)
    for result, photo in zip(both, (group, portrait), strict=True):
        assert result.key is None
        change = np.abs(np.asarray(result).astype(int) - photo).max(axis=2)
        assert 0.02 < (change > 0).mean() < 0.6
    alone = protector.anonymize(portrait, carry=True, secret=SECRET)
    assert np.abs(np.asarray(alone).astype(int) - np.asarray(both[1])).max() <= 1
    back = protector.recover_carried([r.image for r in both], SECRET)
    assert [r.faces for r in back] == [r.faces for r in both]
    changed = np.asarray(both[0]).astype(int) != group
    assert not (np.asarray(back[0]) != np.asarray(both[0]))[~changed].any() or changed.any()
    other = protector.anonymize(group, carry=True, secret=bytes(32))
    assert (np.asarray(other) != np.asarray(both[0])).any()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(secret=st.binary(min_size=32, max_size=32), quality=st.integers(1, 100))
def test_a_wrong_secret_never_crashes(
    protector: Protector, portrait: Pixels, secret: bytes, quality: int
) -> None:
    photo = protector.anonymize(portrait, carry=True, secret=SECRET).image
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    result = protector.recover_carried(file.getvalue(), secret)
    assert result.image.size == (110, 90)
    assert len(result.faces) == 1


def test_aligned_faces_are_not_looked_for(protector: Protector, detector: ListedDetector) -> None:
    face = np.full((40, 40, 3), 90, dtype=np.uint8)
    result = protector.anonymize(face, carry=True, secret=SECRET, aligned=True)
    protector.recover_carried(result.image, SECRET, aligned=True)
    assert detector.seen == []


class _Wandering(ListedDetector):
    """Sees a face somewhere else as soon as the photo is not the first one it saw."""

    def detect(self, pixels: Pixels, /) -> Sequence[Face]:
        faces = super().detect(pixels)
        moves = len(self.seen) - 1
        return [Face(f.box, f.landmarks + 20.0 * moves) for f in faces]


def test_a_face_that_is_not_found_again_is_an_error(
    protector: Protector, detector: ListedDetector, portrait: Pixels
) -> None:
    lost = Protector(protector.programs, detector=_Wandering(detector.faces))
    with pytest.raises(NoFaceError, match="not find a new face again"):
        lost.anonymize(portrait, carry=True, secret=SECRET)
    (face,) = detector.faces[portrait.shape[:2]]
    result = lost.anonymize(portrait, carry=True, secret=SECRET, faces=[face])
    lost.recover_carried(result.image, SECRET, faces=[face])


def test_what_does_not_go_together(protector: Protector, portrait: Pixels) -> None:
    with pytest.raises(OptionError, match="give secret"):
        protector.anonymize(portrait, carry=True)
    with pytest.raises(OptionError, match="do not apply"):
        protector.anonymize(portrait, carry=True, secret=SECRET, variants=2)
    with pytest.raises(OptionError, match="it is for carry"):
        protector.anonymize(portrait, secret=SECRET)


def test_photos_without_faces_are_kept(protector: Protector) -> None:
    empty = np.zeros((20, 30, 3), dtype=np.uint8)
    with pytest.raises(NoFaceError):
        protector.anonymize(empty, carry=True, secret=SECRET)
    kept = protector.anonymize(empty, carry=True, secret=SECRET, on_missing="keep")
    np.testing.assert_array_equal(np.asarray(kept), empty)
    np.testing.assert_array_equal(
        np.asarray(protector.recover_carried(empty, SECRET, on_missing="keep")), empty
    )


def test_secrets() -> None:
    key = NoiseKey.from_seed(1)
    assert secret_key(key) is key
    assert secret_key(SECRET) == NoiseKey.from_bytes(SECRET)
    assert secret_key("correct horse battery") == secret_key("correct horse battery")
    assert secret_key("correct horse battery") != secret_key("correct horse batterz")
    for wrong in ("", "aaaaaaaaaaaa", b"short", 7):
        with pytest.raises(OptionError) as caught:
            secret_key(wrong)  # type: ignore[arg-type]
        assert "aaaa" not in str(caught.value)
        assert "short'" not in str(caught.value)


def test_the_embedded_bundle_carries_a_face_through_jpeg() -> None:
    data = pytest.importorskip("skimage.data")
    pixels = np.asarray(Image.fromarray(data.astronaut()).crop((120, 0, 376, 256)))
    protector = Protector.load(threads=1)
    result = protector.anonymize(pixels, carry=True, secret=SECRET)
    file = io.BytesIO()
    result.image.save(file, "JPEG", quality=90)
    own = protector.embed(pixels).embeddings[0]

    def cosine(photo: object) -> float:
        return float(protector.embed(photo).embeddings[0] @ own)  # type: ignore[call-overload]

    threshold = protector.bundle.thresholds["0.01"]
    assert cosine(result.image) < threshold
    assert cosine(protector.recover_carried(file.getvalue(), SECRET).image) > threshold
    wrong = bytes([1, *SECRET[1:]])
    assert cosine(protector.recover_carried(file.getvalue(), wrong).image) < threshold
