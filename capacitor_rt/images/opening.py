"""From the first bytes of an image file to an opened image of Pillow's and its header, or to the reason why not."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image, ImageFile, TiffImagePlugin

from ..errors import ImageError
from .reasons import CORRUPT, NOT_AN_IMAGE, OUT_OF_MEMORY, TOO_LARGE, TRUNCATED, UNREADABLE, UNSUPPORTED

# decoded by native code alone: EPS would start ghostscript, WMF needs Windows, TGA has no signature
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "QOI")

_WEAK_SIGNATURES = ("BMP", "PPM")
_OTHERS = (
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"8BPS", "Photoshop"),
    (0, b"<svg", "SVG"),
    (0, b"v/1\x01", "OpenEXR"),
)
_BEYOND_PILLOW = ("unknown pixel mode", "cannot handle", "not supported", "unsupported")
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}

# without a handler of the program's own, what Pillow logs of damaged files would go to stderr
logging.getLogger("PIL").addHandler(logging.NullHandler())
Image.init()
_KNOWN_FORMATS = tuple(f for f in FORMATS if f in Image.OPEN)


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of itself.

    `width` and `height` are as displayed, after the EXIF `orientation` (1-8; 1 if absent or invalid); `format` and
    `mode` (of the samples) are Pillow's words; `icc` tells whether there is a colour profile.
    """

    width: int
    height: int
    orientation: int
    format: str
    mode: str = ""
    icc: bool = False


def header_of(image: Image.Image) -> ImageHeader:
    """The header of an opened image."""
    orientation = orientation_of(image)
    # the size of an opened TIFF is as stored in some versions of Pillow and as displayed in others
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = image.tag_v2[256], image.tag_v2[257]
    if orientation >= 5:
        width, height = height, width
    return ImageHeader(width, height, orientation, image.format or "", image.mode, bool(image.info.get("icc_profile")))


def orientation_of(image: Image.Image) -> int:
    """EXIF's, 1-8; 1 if absent, invalid or damaged."""
    try:
        # the base class's method: the PNG plugin's decodes the picture in search of a late chunk
        value = Image.Image.getexif(image).get(0x0112, 1)
    except Exception:
        # damaged metadata says nothing of the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def open_stream(stream: BinaryIO, name: str, max_pixels: int) -> ImageFile.ImageFile:
    """Identify and read the header; `stream` stays in use by the image.

    The registered plugin is called rather than `Image.open`, which hides what the plugin said, warns of large images
    and has a limit that only a global variable changes.
    """
    with decoder_errors(stream, name, None):
        stream.seek(0)
        head = stream.read(30)
    format, complaint = _identify(head[:16])
    if format is None:
        raise _unidentified(head[:16], name)
    if complaint:
        raise ImageError(UNSUPPORTED, f"{name} is {format}: {complaint}")
    if format == "WEBP":
        # the plugin takes the memory of two pictures as soon as it opens one
        check_size(*_webp_size(head), name, max_pixels)
    with decoder_errors(stream, name, format):
        stream.seek(0)
        image = Image.OPEN[format][0](stream, "")
    if image.width < 1 or image.height < 1:
        raise ImageError(CORRUPT, f"{name} declares {image.width}x{image.height} pixels")
    check_size(image.width, image.height, name, max_pixels)
    if (area := tile_area(image)) > max_pixels:
        raise ImageError(TOO_LARGE, f"{name} has tiles of {area} pixels: the limit is {max_pixels}")
    return image


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height that the first 30 bytes of a WebP announce; 0 if they do not."""
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return 0, 0


def tile_area(image: Image.Image) -> int:
    """Pixels of a TIFF's tile, which may be larger than the picture and is decoded whole."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    width, height = image.tag_v2.get(322, 0), image.tag_v2.get(323, 0)
    return width * height if isinstance(width, int) and isinstance(height, int) else 0


def check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    """Raise ImageError for more than `max_pixels`."""
    if width * height > max_pixels:
        raise ImageError(TOO_LARGE, f"{name} is {width}x{height}, {width * height} pixels: the limit is {max_pixels}")


@contextmanager
def decoder_errors(stream: BinaryIO, name: str, opening: str | None = None) -> Iterator[None]:
    """Give what Pillow raises a reason. Its plugins raise nearly every built-in exception on damaged files."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(OUT_OF_MEMORY, f"{name} needs more memory than there is") from error
    except Image.DecompressionBombError as error:
        raise ImageError(TOO_LARGE, f"{name} is too large to be decoded: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(UNREADABLE, f"{name}: {os.strerror(error.errno)}") from error
        detail = str(error) or type(error).__name__
        reason = _reason(stream, detail, opening)
        raise ImageError(reason, f"{name} cannot be decoded: {detail}") from error


def _reason(stream: BinaryIO, detail: str, opening: str | None) -> str:
    if opening in _WEAK_SIGNATURES:
        # two letters, with which many a text begins
        return NOT_AN_IMAGE
    detail = detail.lower()
    if any(words in detail for words in _BEYOND_PILLOW):
        return UNSUPPORTED
    return TRUNCATED if "truncat" in detail or _ends_early(stream) else CORRUPT


def _identify(head: bytes) -> tuple[str | None, str]:
    """Format by the first 16 bytes, None if unknown; and why this build of Pillow cannot decode it, or nothing."""
    for format in _KNOWN_FORMATS:
        accept = Image.OPEN[format][1]
        accepted = accept is not None and accept(head)
        if accepted:
            return format, accepted if isinstance(accepted, str) else ""
    return None, ""


def _unidentified(head: bytes, name: str) -> ImageError:
    known = next((kind for at, mark, kind in _OTHERS if head[at : at + len(mark)] == mark), None)
    if known is None:
        return ImageError(NOT_AN_IMAGE, f"{name} begins with {head!r}, like no image format known here")
    return ImageError(UNSUPPORTED, f"{name} is {known}: convert it to PNG, JPEG, WebP or TIFF")


def _ends_early(stream: BinaryIO) -> bool:
    """Whether the file lacks its format's end: after a failure, tells "truncated" from "corrupt"."""
    try:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        head = stream.read(16)
        stream.seek(max(0, size - 1024))
        tail = stream.read()
    except (OSError, ValueError):
        return False
    format, _ = _identify(head)
    if format == "TIFF":
        # the directory often stands behind the pixels
        return int.from_bytes(head[4:8], "little" if head[:1] == b"I" else "big") + 2 > size
    if format == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 > size
    if format == "GIF":
        return not tail.rstrip(b"\0").endswith(_END_MARKS[format])
    return format in _END_MARKS and _END_MARKS[format] not in tail
