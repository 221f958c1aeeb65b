"""Decoding, conventions, limits and saving of photos."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin

from diffveil.errors import OptionError, PhotoError
from diffveil.photos import MAX_PIXELS, load_photo, save_photo

Pixels = NDArray[np.uint8]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def pixels(rng: np.random.Generator) -> Pixels:
    return rng.integers(0, 256, (13, 21, 3), dtype=np.uint8)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


# What a viewer does for each EXIF orientation (CIPA DC-008, 4.6.4), as array operations.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
def test_orientation_is_applied(pixels: Pixels, orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(Image.fromarray(pixels), file_format, exif=exif, **options)
    np.testing.assert_array_equal(load_photo(data).pixels, UPRIGHT[orientation](pixels))


def test_orientation_of_a_pillow_image_and_of_a_jpeg_size(pixels: Pixels) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(pixels), "JPEG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        photo = load_photo(image)
    assert (photo.width, photo.height) == (13, 21)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_meaningless_orientation_is_ignored(pixels: Pixels, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    np.testing.assert_array_equal(load_photo(data).pixels, pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".bmp"])
def test_lossless_formats_round_trip(tmp_path: Path, pixels: Pixels, suffix: str) -> None:
    path = save_photo(pixels, tmp_path / f"photo{suffix}")
    photo = load_photo(path)
    np.testing.assert_array_equal(photo.pixels, pixels)
    assert photo.name == path.name
    assert photo.alpha is None


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_lossy_formats_stay_close(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    smooth = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64))], axis=-1)
    smooth = np.concatenate([smooth, smooth[::-1, :, :1]], axis=-1)
    photo = load_photo(save_photo(smooth, tmp_path / f"photo{suffix}", quality=95))
    assert np.abs(photo.pixels.astype(int) - smooth).max() <= 16


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_transparency_survives(
    tmp_path: Path, rng: np.random.Generator, pixels: Pixels, suffix: str
) -> None:
    alpha = rng.integers(0, 256, pixels.shape[:2], dtype=np.uint8)
    photo = load_photo(np.dstack([pixels, alpha]))
    again = load_photo(save_photo(photo, tmp_path / f"photo{suffix}", quality=100))
    assert again.alpha is not None
    np.testing.assert_array_equal(again.alpha, alpha)
    if suffix != ".webp":  # its colours are lossy
        np.testing.assert_array_equal(again.pixels, pixels)


def test_transparency_becomes_white_where_the_format_has_none(tmp_path: Path) -> None:
    rgba = np.zeros((16, 16, 4), np.uint8)
    photo = load_photo(save_photo(rgba, tmp_path / "photo.bmp"))
    assert (photo.pixels == 255).all()


@pytest.mark.parametrize("mode", ["P", "LA", "1", "L", "YCbCr", "HSV", "RGBX"])
def test_other_modes_match_pillows_conversion(pixels: Pixels, mode: str) -> None:
    image = Image.fromarray(pixels).convert("L" if mode == "LA" else "RGB").convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(load_photo(image).pixels, expected)


def test_palette_with_transparent_colour(pixels: Pixels) -> None:
    image = Image.fromarray(pixels).quantize(16)
    data = encoded(image, "PNG", transparency=3)
    alpha = load_photo(data).alpha
    assert alpha is not None
    np.testing.assert_array_equal(alpha == 0, np.asarray(image) == 3)


def test_cmyk_jpeg_is_converted_and_its_profile_dropped() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    profile = b"\0" * 16 + b"CMYK" + b"\0" * 16 + b"acsp" + b"\0" * 120
    photo = load_photo(encoded(image, "JPEG", quality=100, icc_profile=profile))
    assert photo.icc_profile is None
    assert np.abs(photo.pixels.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_arrays(rng: np.random.Generator, shape: tuple[int, ...], dtype: type) -> None:
    array = rng.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    photo = load_photo(array)
    exact = array.reshape(5, 7, -1)[..., :3] / (257 if dtype is np.uint16 else 1)
    np.testing.assert_array_equal(photo.pixels, np.broadcast_to(np.rint(exact), (5, 7, 3)))
    assert (photo.alpha is not None) == (len(shape) == 3 and shape[2] == 4)


def test_grey_png_of_16_bits(rng: np.random.Generator) -> None:
    grey = rng.integers(0, 65536, (6, 9)).astype(np.uint16)
    photo = load_photo(encoded(Image.fromarray(grey), "PNG"))
    expected = np.rint(grey / 257).astype(np.uint8)
    np.testing.assert_array_equal(photo.pixels, np.repeat(expected[..., None], 3, axis=2))


def test_pixels_cannot_be_changed_from_outside(pixels: Pixels) -> None:
    photo = load_photo(pixels)
    before = pixels.copy()
    pixels[:] = 0
    np.testing.assert_array_equal(photo.pixels, before)
    with pytest.raises(ValueError, match="read-only"):
        photo.pixels[0, 0, 0] = 1


def test_with_pixels_keeps_the_rest_and_checks(pixels: Pixels) -> None:
    photo = load_photo(np.dstack([pixels, np.full(pixels.shape[:2], 9, np.uint8)]))
    other = photo.with_pixels(255 - pixels)
    np.testing.assert_array_equal(other.pixels, 255 - pixels)
    assert other.alpha is photo.alpha
    with pytest.raises(OptionError, match="pixels"):
        photo.with_pixels(pixels[:-1])
    with pytest.raises(OptionError, match="pixels"):
        photo.with_pixels(pixels.astype(np.float32))  # type: ignore[arg-type]


def test_repr_shows_no_pixels(pixels: Pixels) -> None:
    assert repr(load_photo(pixels)) == "Photo(21x13, name='')"


# --- malformed, by class ------------------------------------------------------------------------


def jpeg(size: int = 64) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), "JPEG")


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header states a size and which holds almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 64)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def animation(file_format: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], file_format, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a photo"),
        (b"just some text", "not a photo"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a photo"),
        (jpeg()[:-200], "cannot be decoded"),
        (jpeg()[:30], "damaged|not a photo|cannot be decoded"),
        (encoded(Image.new("RGB", (64, 64)), "PNG")[:-30], "cannot be decoded"),
        (png_claiming(60000, 60000), "pixels"),
        (png_claiming(12000, 8000), "pixels"),
        (png_claiming(64, 64), "cannot be decoded"),
        (png_claiming(0, 64), "pixels|damaged|not a photo"),
        (animation("GIF"), "several frames"),
        (animation("PNG"), "several frames"),
        (animation("TIFF"), "several frames"),
        (animation("WEBP"), "several frames"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "float"),
        (encoded(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"), "32-bit"),
    ],
)
def test_malformed_files(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(PhotoError, match=message):
            load_photo(source)


def test_phones_multi_picture_jpeg_gives_its_main_picture() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black")]
    photo = load_photo(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert (photo.pixels > 250).all()


def test_size_limit_is_checked_before_decoding() -> None:
    # The body is broken: only a check of the header can say that the size is the problem.
    with pytest.raises(PhotoError, match=r"exceed the limit of 100"):
        load_photo(png_claiming(11, 10), max_pixels=100)
    load_photo(np.zeros((10, 10, 3), np.uint8), max_pixels=100)
    with pytest.raises(PhotoError, match="limit"):
        load_photo(np.zeros((10, 11, 3), np.uint8), max_pixels=100)
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS  # so that Pillow never warns within our limit


def test_a_photo_read_under_a_higher_limit_stays_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = load_photo(np.zeros((10, 11, 3), np.uint8), max_pixels=110)
    assert load_photo(photo, max_pixels=100) is photo
    monkeypatch.setattr("diffveil.photos.MAX_PIXELS", 100)
    assert save_photo(photo, tmp_path / "large.png").is_file()


def test_unreadable_paths(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jpg", tmp_path, "nul\0l.jpg"):
        with pytest.raises(PhotoError, match="cannot be read"):
            load_photo(path)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3,), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.int64),
        None,
        42,
    ],
)
def test_wrong_sources(source: object) -> None:
    with pytest.raises(PhotoError):
        load_photo(source)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"]), st.data())
def test_mutated_files_are_photos_or_photo_errors(file_format: str, data: st.DataObject) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0110] = "camera"
    options = {"exif": exif} if file_format in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    content = bytearray(encoded(Image.fromarray(noise), file_format, **options))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = (
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    try:
        photo = load_photo(bytes(content), max_pixels=10_000)
    except PhotoError:
        return
    assert photo.pixels.dtype == np.uint8
    assert photo.pixels.ndim == 3
    assert photo.width * photo.height <= 10_000


@settings(max_examples=30, deadline=None)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM"])
)
def test_random_bytes_are_photo_errors(tail: bytes, magic: bytes) -> None:
    with pytest.raises(PhotoError):
        load_photo(magic + tail, max_pixels=10_000)


# --- saving -------------------------------------------------------------------------------------


def described_jpeg() -> bytes:
    """A JPEG with everything that tells of its origin."""
    preview = encoded(Image.new("RGB", (8, 8), "red"), "JPEG")
    exif = Image.Exif()
    exif[0x0110] = "SecretCamera"
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    exif.get_ifd(0x8769)[0x927C] = b"MAKERNOTE" + preview
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[2] = (47.0, 22.0, 33.0)
    image = Image.new("RGB", (32, 16), (10, 200, 30))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>NameOfPerson</x:xmpmeta>"
    return encoded(image, "JPEG", exif=exif, icc_profile=profile, comment=b"SecretComment", xmp=xmp)


SECRETS = (b"SecretCamera", b"2020:01:02", b"MAKERNOTE", b"SecretComment", b"NameOfPerson")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_metadata_is_stripped_and_colour_profile_kept(tmp_path: Path, suffix: str) -> None:
    source = described_jpeg()
    assert all(secret in source for secret in SECRETS)
    photo = load_photo(source)
    assert photo.exif
    path = save_photo(photo, tmp_path / f"photo{suffix}")
    written = path.read_bytes()
    assert not [secret for secret in SECRETS if secret in written]
    with Image.open(path) as image:
        assert not image.getexif().get_ifd(0x8825)
        assert image.info["icc_profile"] == photo.icc_profile
        assert image.size == (16, 32)
    # Neither does a plain save of the Pillow image that users are handed.
    photo.to_image().save(path)
    assert not [secret for secret in SECRETS if secret in path.read_bytes()]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_kept_metadata_holds_no_previews_and_no_orientation(tmp_path: Path, suffix: str) -> None:
    path = save_photo(load_photo(described_jpeg()), tmp_path / f"photo{suffix}", keep_metadata=True)
    written = path.read_bytes()
    assert not [s for s in (b"MAKERNOTE", b"SecretComment", b"NameOfPerson") if s in written]
    with Image.open(path) as image:
        exif = image.getexif()
        assert exif[0x0110] == "SecretCamera"
        assert exif.get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"
        assert exif.get_ifd(0x8825)[1] == "N"
        assert 0x0112 not in exif or exif[0x0112] == 1
        assert image.size == (16, 32)


def test_png_text_is_stripped(tmp_path: Path, pixels: Pixels) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "SecretName")
    photo = load_photo(encoded(Image.fromarray(pixels), "PNG", pnginfo=text))
    written = save_photo(photo, tmp_path / "photo.png", keep_metadata=True).read_bytes()
    assert b"SecretName" not in written


def test_bad_options(tmp_path: Path, pixels: Pixels) -> None:
    with pytest.raises(OptionError, match="suffix"):
        save_photo(pixels, tmp_path / "photo.heic")
    with pytest.raises(OptionError, match="quality"):
        save_photo(pixels, tmp_path / "photo.jpg", quality=0)
    with pytest.raises(PhotoError, match="cannot be written"):
        save_photo(pixels, tmp_path / "no" / "photo.jpg")
    with pytest.raises(PhotoError, match="WEBP"):  # at most 16383 pixels a side
        save_photo(np.zeros((1, 16384, 3), np.uint8), tmp_path / "photo.webp")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_interrupted_write_leaves_the_old_file(
    tmp_path: Path, pixels: Pixels, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = save_photo(pixels, tmp_path / "photo.png")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(PhotoError, match="No space left"):
        save_photo(255 - pixels, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_new_files_follow_the_umask(tmp_path: Path, pixels: Pixels) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    path = save_photo(pixels, tmp_path / "photo.png")
    assert path.stat().st_mode == plain.stat().st_mode
