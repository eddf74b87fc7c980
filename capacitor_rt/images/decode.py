"""Image files to 8-bit RGB pixels, or to an `ImageError` with one of `reasons.REASONS`.

The EXIF orientation is applied; grey is repeated; transparency (alpha, palette, colour key) is composited on
`background`; 16-bit samples become `round(v * 255 / 65535)`; of an animation the first frame is taken; CMYK is
read as inverted when an Adobe marker says so, and converted by its profile if it has one. Pixels are those of Pillow,
and neither they nor failures depend on the faster way that `jpeg` is for most JPEGs: the tests compare the two.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

import numpy as np
from PIL import ImageFile

from ..errors import ImageError, InputError
from . import jpeg
from .color import ColorMap, to_srgb
from .convert import orient, to_rgb8, unorient
from .opening import ImageHeader, check_size, decoder_errors, header_of, open_stream, orientation_of, tile_area
from .reading import check_not_empty, regular_file, shown
from .reasons import DEFAULT_MAX_PIXELS, EMPTY
from .tiff import strictly

# Pillow has one channel, which stands for grey, also beside an alpha channel
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
# neither transparency nor more than 8 bits, which take several arrays
_SHALLOW = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
_SHRUNK = ("JPEG", "MPO")

Buffer = Callable[[int], bytearray | memoryview]
"""Gives memory of at least so many bytes."""


@dataclass(frozen=True)
class DecodedImage:
    """`pixels`: uint8 `[H,W,3]`, contiguous and writable, upright."""

    pixels: np.ndarray
    header: ImageHeader


def probe(
    source: bytes | bytearray | memoryview | str | PathLike[str], *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> ImageHeader:
    """Read the header of an image: bytes are the file's contents, anything else is its path. No pixel is decoded.

    Raises:
        ImageError: with one of `REASONS`. A header in order says nothing of the pixels behind it.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        check_not_empty(source, "image")
        return header_of(open_stream(io.BytesIO(source), "image", max_pixels))
    with regular_file(source) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ImageError(EMPTY, f"{shown(source)} has no bytes")
        return header_of(open_stream(file, shown(source), max_pixels))


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
            self._image = image = open_stream(io.BytesIO(data), name, max_pixels)
            self.header, self._profile = header_of(image), image.info.get("icc_profile") or b""
            self._grey = image.mode in _GREY
            self.memory = image.width * image.height * (8 if image.mode in _SHALLOW else 20) + 8 * tile_area(image)
            return
        found = self._jpeg
        width, height = found.width, found.height
        check_size(width, height, name, max_pixels)
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
    def is_usual_jpeg(self) -> bool:
        """Whether it is a JPEG that is read without Pillow."""
        return self._jpeg is not None

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
        with decoder_errors(io.BytesIO(self._data), self._name):
            return self._by_pillow(background, b"" if icc == "ignore" else self._profile, shrink)

    def _by_pillow(self, background: tuple[int, int, int], profile: bytes, shrink: int) -> np.ndarray:
        def opened() -> ImageFile.ImageFile:
            return open_stream(io.BytesIO(self._data), self._name, self._max_pixels)

        image, self._image = self._image or opened(), None
        if shrink:
            image.draft(image.mode, (image.width >> shrink, image.height >> shrink))
        orientation = orientation_of(image)
        if image.tile and image.tile[0][0] == "libtiff":
            twice = iter((image, opened()))
            pixels = strictly(lambda: to_rgb8(next(twice), background, opened, profile))
        else:
            pixels = to_rgb8(image, background, opened, profile)
        # Pillow turns a TIFF while it loads, and then drops the tag
        if orientation != orientation_of(image):
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
    check_not_empty(data, name)
    return OpenedImage(data, name, max_pixels)


def decoder_versions() -> dict[str, str]:
    """Names and versions of the libraries that decode here, for the record."""
    from PIL import __version__, features

    versions = {"pillow": __version__, "libjpeg_turbo": features.version_feature("libjpeg_turbo") or "none"}
    if jpeg.simplejpeg is not None:
        versions["simplejpeg"] = jpeg.simplejpeg.__version__
    return versions


def check_background(background: tuple[int, int, int]) -> None:
    """Raise InputError for what is no colour."""
    if len(background) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in background):
        raise InputError(f"background {background!r} is not three whole numbers of 0-255, like (255, 255, 255)")
