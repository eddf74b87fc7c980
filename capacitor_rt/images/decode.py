"""Image files to 8-bit RGB pixels, or to an `ImageError` with one of the reasons below.

The EXIF orientation is applied; grey is repeated; transparency (alpha, palette, colour key) is composited on
`background`; 16-bit samples become `round(v * 255 / 65535)`; of an animation the first frame is taken; CMYK is
read as inverted when an Adobe marker says so, and converted by its profile if it has one. Pixels are those of Pillow,
and neither they nor failures depend on the faster way that `jpeg` is for most JPEGs: the tests compare the two.
"""

from __future__ import annotations

import io
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from ..errors import ImageError, InputError
from . import jpeg
from .color import ColorMap, to_srgb
from .convert import orient, to_rgb8, unorient
from .tiff import strictly

EMPTY = "empty"
"""No bytes."""
NOT_AN_IMAGE = "not_an_image"
"""No known image format begins like this."""
TRUNCATED = "truncated"
"""The file ends before the picture does."""
CORRUPT = "corrupt"
"""It has the form of an image and cannot be decoded. JPEG has no checksum: damage that still decodes is not seen."""
TOO_LARGE = "too_large"
"""More pixels than allowed; found in the header, before memory is taken."""
OUT_OF_MEMORY = "out_of_memory"
"""There was no memory to decode it, which says nothing of the file."""
UNREADABLE = "unreadable"
"""The file cannot be opened or read: permission, I/O error, missing, not a regular file."""
UNSUPPORTED = "unsupported"
"""An image, of a format or sample type that is not decoded here."""
REASONS = (EMPTY, NOT_AN_IMAGE, TRUNCATED, CORRUPT, TOO_LARGE, OUT_OF_MEMORY, UNREADABLE, UNSUPPORTED)

DEFAULT_MAX_PIXELS = 178_956_970
"""Pillow's own hard limit, 512 MiB of RGB; beyond it a file counts as a decompression bomb."""

# decoded by native code alone: EPS would start ghostscript, WMF needs Windows, TGA has no signature
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "QOI")

# Pillow has one channel, which stands for grey, also beside an alpha channel
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
# neither transparency nor more than 8 bits, which take several arrays
_SHALLOW = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
_SHRUNK = ("JPEG", "MPO")

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

Buffer = Callable[[int], bytearray]
"""Gives memory of at least so many bytes."""

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


@dataclass(frozen=True)
class DecodedImage:
    """`pixels`: uint8 `[H,W,3]`, contiguous and writable, upright."""

    pixels: np.ndarray
    header: ImageHeader


def read_bytes(path: str | PathLike[str]) -> bytes:
    """The contents of a regular file.

    Raises:
        ImageError: "unreadable" (also for a directory, FIFO or device, which are never opened for reading); "empty".
    """
    with _regular_file(path) as file, _os_errors(path):
        data = file.read()
    _check_not_empty(data, _shown(path))
    return data


def probe(
    source: bytes | bytearray | memoryview | str | PathLike[str], *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> ImageHeader:
    """Read the header of an image: bytes are the file's contents, anything else is its path. No pixel is decoded.

    Raises:
        ImageError: with one of `REASONS`. A header in order says nothing of the pixels behind it.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        _check_not_empty(source, "image")
        return _header(_open(io.BytesIO(source), "image", max_pixels))
    with _regular_file(source) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ImageError(EMPTY, f"{_shown(source)} has no bytes")
        return _header(_open(file, _shown(source), max_pixels))


def decode_image(
    data: bytes,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = DEFAULT_MAX_PIXELS,
    name: str = "image",
    icc: str = "srgb",
) -> DecodedImage:
    """Decode the contents of an image file. Safe to call from several threads; the decoders release the GIL.

    Args:
        data: the file's bytes.
        background: RGB, 0-255, behind transparent pixels.
        max_pixels: largest width x height that is decoded.
        name: what messages call the image, for instance its path.
        icc: "srgb" brings pixels with a colour profile to sRGB, "ignore" passes profiles over.

    Raises:
        ImageError: with one of `REASONS`.
        InputError: `background` is not a colour; Pillow was told to fill truncated files with grey.
    """
    check_background(background)
    image = open_image(data, name=name, max_pixels=max_pixels)
    pixels = orient(image.stored_pixels(background, icc=icc), image.header.orientation)
    color = image.color_map(icc)
    return DecodedImage(color(pixels) if color else pixels, image.header)


class OpenedImage:
    """An image file whose header is read and whose pixels are not decoded yet.

    Attributes:
        header: of the upright picture.
        memory: bytes that decoding is going to take at most, about.
    """

    header: ImageHeader
    memory: int

    def __init__(self, data: bytes, name: str, max_pixels: int):
        self._data, self._name, self._max_pixels = data, name, max_pixels
        self._image: ImageFile.ImageFile | None = None
        self._jpeg = jpeg.read_header(data)
        if self._jpeg is None:
            self._image = image = _open(io.BytesIO(data), name, max_pixels)
            self.header, self._profile = _header(image), image.info.get("icc_profile") or b""
            self._grey = image.mode in _GREY
            self.memory = image.width * image.height * (8 if image.mode in _SHALLOW else 20) + 8 * _tile_area(image)
            return
        found = self._jpeg
        width, height = found.width, found.height
        _check_size(width, height, name, max_pixels)
        if found.orientation >= 5:
            width, height = height, width
        mode = "L" if found.components == 1 else "RGB"
        self.header = ImageHeader(width, height, found.orientation, "JPEG", mode, bool(found.profile))
        self._profile, self._grey = found.profile, found.components == 1
        # a progressive one is held as coefficients first
        self.memory = width * height * (3 + 3 * found.components * found.progressive)

    def color_map(self, icc: str) -> ColorMap | None:
        """What brings `stored_pixels` to sRGB, None if nothing has to be done."""
        if icc == "ignore" or not isinstance(self._profile, bytes) or not self._profile:
            return None
        return to_srgb(self._profile, "GRAY" if self._grey else "RGB")

    @property
    def shrinks(self) -> bool:
        """Whether `stored_pixels` can decode a smaller picture."""
        return self.header.format in _SHRUNK

    def stored_pixels(
        self, background: tuple[int, int, int], *, icc: str = "srgb", shrink: int = 0, buffer: Buffer | None = None
    ) -> np.ndarray:
        """uint8 `[H,W,3]`, writable, as it is stored: neither turned upright nor, but for CMYK, brought to sRGB.

        Args:
            shrink: decode a JPEG at 1/2^shrink of its size, rounded up.
            buffer: gives memory of so many bytes, which the pixels may lie in.

        Raises:
            ImageError: with one of `REASONS`.
        """
        if self._jpeg is not None:
            height, width = (jpeg.shrunk(side, shrink) for side in (self._jpeg.height, self._jpeg.width))
            memory = None if buffer is None else buffer(height * width * 3)
            pixels = jpeg.decode(self._data, self._jpeg, shrink, memory)
            if pixels is not None:
                return pixels
        with _decoder_errors(io.BytesIO(self._data), self._name):
            return self._by_pillow(background, b"" if icc == "ignore" else self._profile, shrink)

    def _by_pillow(self, background: tuple[int, int, int], profile: bytes, shrink: int) -> np.ndarray:
        def opened() -> ImageFile.ImageFile:
            return _open(io.BytesIO(self._data), self._name, self._max_pixels)

        image, self._image = self._image or opened(), None
        if shrink:
            image.draft(image.mode, (image.width >> shrink, image.height >> shrink))
        orientation = _orientation(image)
        if image.tile and image.tile[0][0] == "libtiff":
            twice = iter((image, opened()))
            pixels = strictly(lambda: to_rgb8(next(twice), background, opened, profile))
        else:
            pixels = to_rgb8(image, background, opened, profile)
        # Pillow turns a TIFF while it loads, and then drops the tag
        if orientation != _orientation(image):
            return unorient(pixels, orientation)
        return pixels


def open_image(data: bytes, *, name: str = "image", max_pixels: int = DEFAULT_MAX_PIXELS) -> OpenedImage:
    """Read the header of the contents of an image file.

    Raises:
        ImageError: with one of `REASONS`.
        InputError: Pillow was told to fill truncated files with grey.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise InputError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, which turns truncated files into grey pixels: set it to False"
        )
    _check_not_empty(data, name)
    return OpenedImage(data, name, max_pixels)


def decoder_versions() -> dict[str, str]:
    """Names and versions of the libraries that decode here, for the record."""
    from PIL import __version__, features

    versions = {"pillow": __version__, "libjpeg_turbo": features.version_feature("libjpeg_turbo") or "none"}
    if jpeg.simplejpeg is not None:
        versions["simplejpeg"] = jpeg.simplejpeg.__version__
    return versions


def _header(image: Image.Image) -> ImageHeader:
    orientation = _orientation(image)
    # the size of an opened TIFF is as stored in some versions of Pillow and as displayed in others
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = image.tag_v2[256], image.tag_v2[257]
    if orientation >= 5:
        width, height = height, width
    return ImageHeader(width, height, orientation, image.format or "", image.mode, bool(image.info.get("icc_profile")))


def _orientation(image: Image.Image) -> int:
    try:
        # the base class's method: the PNG plugin's decodes the picture in search of a late chunk
        value = Image.Image.getexif(image).get(0x0112, 1)
    except Exception:
        # damaged metadata says nothing of the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _open(stream: BinaryIO, name: str, max_pixels: int) -> ImageFile.ImageFile:
    """Identify and read the header; `stream` stays in use by the image.

    The registered plugin is called rather than `Image.open`, which hides what the plugin said, warns of large images
    and has a limit that only a global variable changes.
    """
    with _decoder_errors(stream, name, None):
        stream.seek(0)
        head = stream.read(30)
    format, complaint = _identify(head[:16])
    if format is None:
        raise _unidentified(head[:16], name)
    if complaint:
        raise ImageError(UNSUPPORTED, f"{name} is {format}: {complaint}")
    if format == "WEBP":
        # the plugin takes the memory of two pictures as soon as it opens one
        _check_size(*_webp_size(head), name, max_pixels)
    with _decoder_errors(stream, name, format):
        stream.seek(0)
        image = Image.OPEN[format][0](stream, "")
    if image.width < 1 or image.height < 1:
        raise ImageError(CORRUPT, f"{name} declares {image.width}x{image.height} pixels")
    _check_size(image.width, image.height, name, max_pixels)
    if (area := _tile_area(image)) > max_pixels:
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


def _tile_area(image: Image.Image) -> int:
    """Pixels of a TIFF's tile, which may be larger than the picture and is decoded whole."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    width, height = image.tag_v2.get(322, 0), image.tag_v2.get(323, 0)
    return width * height if isinstance(width, int) and isinstance(height, int) else 0


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(TOO_LARGE, f"{name} is {width}x{height}, {width * height} pixels: the limit is {max_pixels}")


@contextmanager
def _decoder_errors(stream: BinaryIO, name: str, opening: str | None = None) -> Iterator[None]:
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


@contextmanager
def _regular_file(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    with _os_errors(path):
        # O_NONBLOCK: opening a FIFO waits for a writer otherwise; stat first, as opening a device may have effects
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise ImageError(UNREADABLE, f"{_shown(path)} is {_kind(mode)}, not a regular file")
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        file = os.fdopen(fd, "rb")
    with file:
        if not stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode):
            raise ImageError(UNREADABLE, f"{_shown(path)} is {_kind(mode)}, not a regular file")
        yield file


@contextmanager
def _os_errors(path: str | PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ImageError(UNREADABLE, f"{_shown(path)} cannot be read: {why}") from error
    except ValueError as error:
        raise ImageError(UNREADABLE, f"{_shown(path)} is not a path: {error}") from error


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "special")


def _shown(path: str | PathLike[str]) -> str:
    """The path in a form that any terminal and any encoding takes."""
    text = os.fsdecode(path)
    return text if text.isprintable() else ascii(text)


def _check_not_empty(data: bytes | bytearray | memoryview, name: str) -> None:
    if len(data) == 0:
        raise ImageError(EMPTY, f"{name} has no bytes")


def check_background(background: tuple[int, int, int]) -> None:
    """Raise InputError for what is no colour."""
    if len(background) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in background):
        raise InputError(f"background {background!r} is not three whole numbers of 0-255, like (255, 255, 255)")
