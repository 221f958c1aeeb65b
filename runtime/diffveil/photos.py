"""Photos in and out: decoding with limits, one pixel convention, saving without traces.

Whatever comes in (JPEG, PNG, WebP, TIFF…, a Pillow image, an array) becomes a `Photo`: upright,
8-bit RGB. What a photo carries besides its colours is treated as follows.

* EXIF orientation is applied, so that a face stands upright before it is looked for.
* Transparency is kept beside the colours and restored on saving where the file format has it;
  otherwise the photo is laid on white. The colours below transparent pixels are protected too.
* An RGB colour profile (ICC) is kept: without it the colours change. Profiles of other colour
  spaces are dropped when the photo is converted to RGB.
* EXIF, GPS, XMP, IPTC and comments identify people as faces do: they are not written, unless the
  caller asks to keep EXIF. Previews inside EXIF show the original face and are never written.
* Animations and multi-page files are refused: only one frame of them would be protected. Of a
  phone's multi-picture JPEG the main picture is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from diffveil.errors import OptionError, PhotoError

__all__ = [
    "MAX_PIXELS",
    "Photo",
    "PhotoSource",
    "encode_photo",
    "load_photo",
    "photo_digest",
    "save_photo",
    "shows_same_pixels",
    "write_photo",
]

PhotoSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[Any] | Photo"
"""What `load_photo` reads: a path, an encoded file's bytes, a Pillow image or an array."""

MAX_PIXELS = 89_478_485
"""Default size limit in pixels: where Pillow itself begins to warn of decompression bombs."""

# Other decoders of Pillow are not needed for photos and only widen what an attacker can reach
# (EPS starts Ghostscript, for one). HEIF is read when the app has registered pillow-heif.
_READABLE = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "HEIF")
_WRITABLE = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
_WITH_ALPHA = ("PNG", "WEBP", "TIFF")
_LOSSLESS = ("BMP", "PNG", "TIFF")
_WITH_EXIF = ("JPEG", "PNG", "WEBP", "TIFF")

_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# EXIF tags that survive `keep_metadata`: descriptions, never previews, maker notes (which hold
# previews too) or Windows' and Adobe's private blocks.
_EXIF_TEXT_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_EXIF_IFD, _GPS_IFD, _MAKER_NOTE, _INTEROP_IFD = 0x8769, 0x8825, 0x927C, 0xA005
_MAX_ICC_BYTES = 4 * 2**20


@dataclass(frozen=True, eq=False)
class Photo:
    """An upright photo in memory.

    Attributes:
        pixels: Colours, uint8 [H, W, 3], RGB, read-only.
        name: File name without folders, or "" when the photo did not come from a file.
        alpha: Opacity, uint8 [H, W], 0 transparent … 255 opaque, or None when opaque throughout.
        icc_profile: RGB colour profile of `pixels`, or None for sRGB.
        exif: Cleaned EXIF block (no previews, orientation removed), or b"".
    """

    pixels: NDArray[np.uint8]
    name: str = ""
    alpha: NDArray[np.uint8] | None = None
    icc_profile: bytes | None = field(default=None, repr=False)
    exif: bytes = field(default=b"", repr=False)

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self.pixels.shape[1])

    def __repr__(self) -> str:
        """Size and name; never pixels."""
        return f"Photo({self.width}x{self.height}, name={self.name!r})"

    def with_pixels(self, pixels: NDArray[np.uint8]) -> Photo:
        """The same photo with other colours, as a protected photo is.

        Args:
            pixels: uint8 [H, W, 3], RGB, of the same height and width.

        Raises:
            OptionError: The shape or type differs from this photo's.
        """
        if pixels.shape != self.pixels.shape or pixels.dtype != np.uint8:
            raise OptionError(
                f"pixels: expected uint8 {list(self.pixels.shape)}, "
                f"received {pixels.dtype} {list(pixels.shape)}"
            )
        return replace(self, pixels=_frozen(pixels))

    def to_image(self) -> Image.Image:
        """A Pillow image, RGB or RGBA, with the colour profile and nothing else attached."""
        image = Image.fromarray(self.pixels)
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        if self.icc_profile is not None:
            image.info["icc_profile"] = self.icc_profile
        return image


def load_photo(source: PhotoSource, *, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read a photo and bring it to the one convention: upright 8-bit RGB.

    Args:
        source: A path, the bytes of an image file, a Pillow image, or an array: uint8 or uint16
            [H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA. 16-bit values are rounded to 8 bits.
        max_pixels: Largest accepted width × height, compared with the file's header before
            anything is decoded. To go beyond the default, raise `PIL.Image.MAX_IMAGE_PIXELS` too:
            Pillow's own limit stays in force.

    Raises:
        PhotoError: Missing, malformed, truncated, too large, animated, or of a kind that is not
            a photo (32-bit float, Lab).
    """
    if isinstance(source, Photo):
        return source  # its size was accepted when it was made, perhaps under a higher limit
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        return _from_image(source, "", max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(source), "", max_pixels)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        try:
            with path.open("rb") as file:
                return _from_file(file, path.name, max_pixels)
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            reason = getattr(error, "strerror", None) or str(error)
            raise PhotoError(f"{path}: cannot be read: {reason}") from error
    raise PhotoError(
        f"expected a path, bytes, a Pillow image or an array, received {type(source).__name__}"
    )


def save_photo(
    image: PhotoSource,
    path: str | os.PathLike[str],
    *,
    quality: int = 95,
    keep_metadata: bool = False,
) -> Path:
    """Write a photo in the format that the file's suffix names.

    The file appears complete or not at all: an interrupted write leaves what was there before.

    Args:
        image: What to write; anything that `load_photo` reads.
        path: Ends in .jpg, .jpeg, .png, .webp, .tif, .tiff or .bmp. The folder must exist.
        quality: Of JPEG and WebP, 1 (small) … 100 (faithful).
        keep_metadata: Write EXIF (date, camera, place) as well. Previews of the original photo,
            maker notes, XMP and IPTC are never written.

    Returns:
        The path written.

    Raises:
        OptionError: Unknown suffix, or quality out of range.
        PhotoError: `image` cannot be read, or the file cannot be written.
    """
    return write_photo(
        encode_photo(image, path, quality=quality, keep_metadata=keep_metadata), path
    )


def encode_photo(
    image: PhotoSource,
    path: str | os.PathLike[str],
    *,
    quality: int = 95,
    keep_metadata: bool = False,
) -> bytes:
    """The file that `save_photo` would write, in memory. Arguments and errors are its own."""
    target = Path(path)
    file_format = _WRITABLE.get(target.suffix.lower())
    if file_format is None:
        known = " ".join(_WRITABLE)
        raise OptionError(
            f"{target.name}: unknown suffix {target.suffix!r}, expected one of {known}"
        )
    if not 1 <= quality <= 100:
        raise OptionError(f"quality: received {quality}, expected 1 … 100")
    return _encode(load_photo(image), file_format, quality, keep_metadata)


def write_photo(encoded: bytes, path: str | os.PathLike[str]) -> Path:
    """Write an encoded photo, whole or not at all.

    Raises:
        PhotoError: The file cannot be written.
    """
    target = Path(path)
    try:
        with _replacing(target) as file:
            file.write(encoded)
    except OSError as error:
        raise PhotoError(f"{target}: cannot be written: {error.strerror or error}") from error
    return target


def shows_same_pixels(photo: Photo, path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name, as `save_photo` writes it, shows the photo's very pixels."""
    file_format = _WRITABLE.get(Path(path).suffix.lower())
    return file_format in _LOSSLESS and (photo.alpha is None or file_format in _WITH_ALPHA)


def photo_digest(photo: Photo) -> bytes:
    """SHA-256 of a photo's size and pixels: names it whatever it is called or comes along with.

    Hashed are height, width and 3 as little-endian int64, then the RGB values row by row. Opacity,
    metadata and the file's encoding do not count, so a lossless copy is the same photo.
    """
    digest = hashlib.sha256(np.array(photo.pixels.shape, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(photo.pixels).data)
    return digest.digest()


def _from_file(file: Any, name: str, max_pixels: int) -> Photo:
    """Decode an open binary file."""
    Image.init()
    formats = [one for one in _READABLE if one in Image.OPEN]
    label = name or "photo"
    try:
        image = Image.open(file, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PhotoError(f"{label}: more pixels than Pillow's limit, or a bomb") from error
    except UnidentifiedImageError as error:
        raise PhotoError(f"{label}: not a photo in a format that is read here") from error
    except Exception as error:  # decoders of hostile bytes raise nearly every class
        raise PhotoError(f"{label}: damaged ({error})") from error
    with image:
        return _from_image(image, name, max_pixels)


def _from_image(image: Image.Image, name: str, max_pixels: int) -> Photo:
    """Bring a Pillow image to the convention; decodes it if that has not happened yet."""
    label = name or "photo"
    _check_size(image.width, image.height, max_pixels, label)
    try:
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise PhotoError(f"{label}: has several frames or pages; extract them and pass one")
        image.load()
        orientation, exif = _read_exif(image)
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
        pixels, alpha = _to_rgb(image, label)
    except PhotoError:
        raise
    except Exception as error:  # as above
        raise PhotoError(f"{label}: cannot be decoded ({error})") from error
    icc = image.info.get("icc_profile")
    if not _is_rgb_profile(icc) or image.mode not in ("RGB", "RGBA", "RGBX", "P", "PA"):
        icc = None
    return Photo(_frozen(pixels), name, alpha, icc, exif)


def _from_array(array: NDArray[Any], max_pixels: int) -> Photo:
    """Check an array and bring it to the convention."""
    described = f"received {array.dtype} {list(array.shape)}"
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3):
        raise PhotoError(f"array: {described}, expected uint8 [H, W, 3] RGB (or [H, W], [H, W, 4])")
    if channels not in (1, 3, 4):
        raise PhotoError(f"array: {described}, expected 1, 3 or 4 channels in the last axis")
    _check_size(array.shape[1], array.shape[0], max_pixels, "array")
    if array.dtype == np.uint16:
        array = _eight_bits(array)
    if channels == 1:
        pixels = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
        return Photo(_frozen(pixels))
    alpha = _opacity(array[..., 3]) if channels == 4 else None
    return Photo(_frozen(array[..., :3]), alpha=alpha)


def _to_rgb(image: Image.Image, label: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Colours uint8 [H, W, 3] and opacity uint8 [H, W] or None, of a decoded image."""
    if image.mode.startswith("I"):  # "I;16", "I;16B" and, from some decoders, 16 bits in "I"
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise PhotoError(f"{label}: 32-bit values; convert to 8 or 16 bits first")
        grey = _eight_bits(values)
        return np.repeat(grey[..., None], 3, axis=2), None
    if image.mode == "F":
        raise PhotoError(f"{label}: 32-bit float values; convert to 8 or 16 bits first")
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        return rgba[..., :3], _opacity(rgba[..., 3])
    return np.asarray(image.convert("RGB")), None


def _eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """0 … 65535 to 0 … 255, rounded: 257 = 65535 / 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _opacity(alpha: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The alpha channel, or None where it says nothing."""
    return None if bool((alpha == 255).all()) else _frozen(alpha)


def _frozen(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A contiguous read-only array that the caller cannot change behind our back."""
    copy = np.array(array, dtype=np.uint8, order="C")
    copy.flags.writeable = False
    return copy


def _check_size(width: int, height: int, max_pixels: int, label: str = "photo") -> None:
    """Refuse empty and oversized photos."""
    if width < 1 or height < 1:
        raise PhotoError(f"{label}: {width}x{height} has no pixels")
    if width * height > max_pixels:
        raise PhotoError(
            f"{label}: {width}x{height} pixels exceed the limit of {max_pixels}; "
            "scale it down or raise max_pixels"
        )


def _read_exif(image: Image.Image) -> tuple[int, bytes]:
    """Orientation (1 … 8) and the cleaned block. Unreadable EXIF counts as none."""
    try:
        source = image.getexif()
        orientation = source.get(_ORIENTATION, 1)
        kept = Image.Exif()
        for tag in _EXIF_TEXT_TAGS:
            if tag in source:
                kept[tag] = source[tag]
        for ifd in (_EXIF_IFD, _GPS_IFD):
            entries = dict(source.get_ifd(ifd))
            for private in (_MAKER_NOTE, _INTEROP_IFD):
                entries.pop(private, None)
            if entries:
                kept.get_ifd(ifd).update(entries)
        block = kept.tobytes() if len(kept) or kept.get_ifd(_EXIF_IFD) else b""
    except Exception:  # hostile EXIF must not cost the photo; what is not kept is not written
        return 1, b""
    return (orientation if isinstance(orientation, int) else 1), block


def _is_rgb_profile(profile: object) -> bool:
    """Whether these are an ICC profile's bytes (ICC.1:2010, 7.2) of the RGB colour space."""
    return (
        isinstance(profile, bytes)
        and 128 <= len(profile) <= _MAX_ICC_BYTES
        and profile[36:40] == b"acsp"
        and profile[16:20] == b"RGB "
    )


def _encode(photo: Photo, file_format: str, quality: int, keep_metadata: bool) -> bytes:
    """The bytes of an image file."""
    options: dict[str, Any] = {}
    image = photo.to_image()
    if image.mode == "RGBA" and file_format not in _WITH_ALPHA:
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A"))
        image = flat
    if file_format == "JPEG":
        # Full colour resolution: subsampling blurs lips and eyes.
        options |= {"quality": quality, "subsampling": 0, "optimize": True}
    elif file_format == "WEBP":
        options |= {"quality": quality, "exact": True}
    if photo.icc_profile is not None and file_format != "BMP":
        options["icc_profile"] = photo.icc_profile
    if keep_metadata and photo.exif and file_format in _WITH_EXIF:
        options["exif"] = photo.exif  # in TIFF uncompressed: libtiff refuses EXIF blocks
    elif file_format == "TIFF":
        options["compression"] = "tiff_adobe_deflate"
    buffer = io.BytesIO()
    try:
        image.save(buffer, file_format, **options)
    except Exception as error:  # encoders raise several classes, for instance above 16383 in WebP
        raise PhotoError(
            f"{photo.width}x{photo.height} cannot be written as {file_format}: {error}"
        ) from error
    return buffer.getvalue()


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[io.BufferedWriter]:
    """A file that takes `target`'s place once it is complete and on the disk."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:  # "x": never through someone's symbolic link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
