"""Mutants of image files of every format, and what must hold of each: a picture, or an error in words, and always the
same one, whichever decoder was quicker and whatever memory held before."""

from __future__ import annotations

import ctypes
import io
import os
import random
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, features

from capacitor_rt.errors import ImageError
from capacitor_rt.images import jpeg
from capacitor_rt.images.decode import decode_image, open_image, probe
from capacitor_rt.images.encoded import RECORD_BYTES, exact_pixels, load_encoded, read_encoded
from capacitor_rt.images.geometry import bucket_table
from capacitor_rt.images.load import PixelPolicy, View, load_image

from .forked import Surface
from .image_segments import add_packed, edit_segments

CORPUS = Path(__file__).parent / "corpus" / "images"
# smaller than the default, so that a mutant with room for more is quickly judged
MAX_PIXELS = 3 << 20
BUCKETS = bucket_table(64, 16)
# of memory beyond what the header announces: files, Python and what libraries keep
SPARE_BYTES = 48 << 20
_M_PERTURB = -6

NUMBERS = (
    0, 1, 2, 3, 7, 8, 15, 16, 17, 255, 256, 257, 1000, 4096, 32767, 32768, 65535, 65536, 1 << 24, 2**31 - 1, 2**31,
    2**32 - 1,
)  # fmt: skip
TIFF_TAGS = (
    254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 274, 277, 278, 279, 280, 282, 284, 292, 293, 296, 305, 317, 318,
    320, 322, 323, 324, 325, 338, 339, 347, 512, 513, 514, 529, 530, 531, 532, 34665, 34675,
)  # fmt: skip
COMPRESSIONS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 32773, 32809, 32946, 34676, 34712, 34925, 50000, 50001, 50002)


def _picture(width: int, height: int, channels: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 80 * np.sin(x / (3 + c) + seed) * np.cos(y / (4 + c)) for c in range(channels)]
    return (np.stack(waves, -1) + rng.normal(0, 8, (height, width, channels))).clip(0, 255).astype(np.uint8)


def _saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@cache
def originals() -> tuple[tuple[str, bytes], ...]:
    """Small images of every format and kind that this Pillow writes, by name."""
    rgb = Image.fromarray(_picture(61, 47, 3, 1))
    grey, rgba = Image.fromarray(_picture(61, 47, 1, 2)[..., 0]), Image.fromarray(_picture(61, 47, 4, 3))
    bilevel, palette = grey.point(lambda v: 255 * (v > 120)).convert("1"), rgb.quantize(32)
    deep = Image.fromarray(_picture(61, 47, 1, 4)[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9003] = 6, "a maker", "2026:01:01 00:00:00"
    wide = Image.fromarray(_picture(300, 40, 3, 5))
    found = [
        ("jpeg", _saved(rgb, "JPEG")),
        ("jpeg-exif", _saved(rgb, "JPEG", exif=exif, icc_profile=bytes(200), comment=b"said")),
        ("jpeg-progressive", _saved(rgb, "JPEG", progressive=True, subsampling=0)),
        ("jpeg-restart", _saved(wide, "JPEG", restart_marker_blocks=3)),
        ("jpeg-grey", _saved(grey, "JPEG")),
        ("jpeg-cmyk", _saved(rgb.convert("CMYK"), "JPEG")),
        ("png", _saved(rgb, "PNG")),
        ("png-rgba", _saved(rgba, "PNG", exif=exif)),
        ("png-palette", _saved(palette, "PNG", transparency=3)),
        ("png-bilevel", _saved(bilevel, "PNG")),
        ("png-deep", _saved(deep, "PNG")),
        ("png-frames", _saved(rgb, "PNG", save_all=True, append_images=[rgb.transpose(Image.Transpose.ROTATE_180)])),
        ("gif", _saved(palette, "GIF", transparency=2)),
        ("gif-frames", _saved(palette, "GIF", save_all=True, append_images=[palette.rotate(9)])),
        ("bmp", _saved(rgb, "BMP")),
        ("bmp-palette", _saved(palette, "BMP")),
        ("ppm", _saved(rgb, "PPM")),
        ("pgm-deep", _saved(deep, "PPM")),
        ("tiff", _saved(rgb, "TIFF")),
        ("tiff-exif", _saved(rgb, "TIFF", exif=exif)),
        ("tiff-deep", _saved(deep, "TIFF")),
        ("tiff-cmyk", _saved(rgb.convert("CMYK"), "TIFF", compression="tiff_lzw")),
        ("tiff-rgba", _saved(rgba, "TIFF", compression="tiff_adobe_deflate")),
        ("tiff-palette", _saved(palette, "TIFF", compression="packbits")),
    ]
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_deflate"):
        found.append((f"tiff-{name}", _saved(rgb, "TIFF", compression=name)))
    for name in ("group3", "group4", "tiff_ccitt", "packbits"):
        found.append((f"tiff-{name}-bilevel", _saved(bilevel, "TIFF", compression=name)))
    found.append(("tiff-strips", _saved(wide, "TIFF", compression="tiff_lzw", tiffinfo={278: 8})))
    if features.check("webp"):
        found += [("webp", _saved(rgb, "WEBP")), ("webp-lossless", _saved(rgba, "WEBP", lossless=True, exif=exif))]
    for format in ("JPEG2000", "AVIF", "QOI"):
        if format in Image.SAVE:
            found.append((format.lower(), _saved(rgb, format)))
    return tuple(found)


def _flip(data: bytearray, rng: random.Random) -> str:
    count = rng.choice((1, 1, 2, 4, 16))
    near = min(len(data), rng.choice((32, 200, 1000, len(data))))
    for _ in range(count):
        data[rng.randrange(near)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return f"{count} bytes of the first {near}"


def _cut(data: bytearray, rng: random.Random) -> str:
    at = rng.randrange(len(data))
    del data[at:]
    return f"cut at {at}"


def _remove(data: bytearray, rng: random.Random) -> str:
    at, count = rng.randrange(len(data)), rng.choice((1, 2, 4, 13, 100))
    del data[at : at + count]
    return f"without {count} at {at}"


def _repeat(data: bytearray, rng: random.Random) -> str:
    at, count = rng.randrange(len(data)), rng.choice((1, 4, 12, 64, 400))
    data[at:at] = data[at : at + count]
    return f"{count} at {at} twice"


def _number(data: bytearray, rng: random.Random) -> str:
    size, order = rng.choice((1, 2, 2, 4, 4)), rng.choice("<>")
    at = rng.randrange(max(1, min(len(data), rng.choice((64, 600, len(data)))) - size))
    value = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
    data[at : at + size] = struct.pack(order + {1: "B", 2: "H", 4: "I"}[size], value)
    return f"{value} at {at}"


def _splice(data: bytearray, rng: random.Random) -> str:
    name, other = rng.choice(originals())
    at, there = rng.randrange(len(data)), rng.randrange(len(other))
    data[at:] = other[there:]
    return f"from {at} on {name} from {there} on"


def _noise(data: bytearray, rng: random.Random) -> str:
    at, count = rng.randrange(len(data)), rng.choice((8, 64, 500))
    data[at : at + count] = rng.randbytes(count)
    return f"noise at {at}"


def _tiff_entry(data: bytearray, rng: random.Random) -> str:
    """Another tag, type, count or value in a directory of a TIFF or of EXIF."""
    at = max(data.find(b"II*\0"), data.find(b"MM\0*"))
    if at < 0:
        return _number(data, rng)
    order = "<" if data[at : at + 1] == b"I" else ">"
    try:
        (start,) = struct.unpack_from(order + "I", data, at + 4)
        (count,) = struct.unpack_from(order + "H", data, at + start)
        entry = at + start + 2 + 12 * rng.randrange(max(1, count))
        field = rng.choice(("tag", "kind", "count", "value", "value", "value", "compression"))
        if field == "compression":
            for i in range(count):
                if struct.unpack_from(order + "H", data, at + start + 2 + 12 * i)[0] == 259:
                    struct.pack_into(order + "H", data, at + start + 10 + 12 * i, rng.choice(COMPRESSIONS))
        elif field == "tag":
            struct.pack_into(order + "H", data, entry, rng.choice(TIFF_TAGS))
        elif field == "kind":
            struct.pack_into(order + "H", data, entry + 2, rng.randrange(20))
        else:
            small = rng.choice((0, 1, 2, 8, 16, rng.randrange(100), rng.randrange(len(data))))
            value = rng.choice((small, rng.choice(NUMBERS)))
            struct.pack_into(order + "I", data, entry + (4 if field == "count" else 8), value)
        return f"directory: {field} of {entry}"
    except struct.error:
        return _number(data, rng)


def _png_sums(data: bytearray) -> None:
    """Make the chunks' checksums right again, so that what lies behind them is read."""
    at = 8
    while data[:8] == b"\x89PNG\r\n\x1a\n" and at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            return
        struct.pack_into(">I", data, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length


MUTATIONS: tuple[Callable[[bytearray, random.Random], str], ...] = (
    _flip, _flip, _flip, _cut, _remove, _repeat, _number, _number, _splice, _noise, _tiff_entry, _tiff_entry,
    edit_segments, edit_segments, add_packed,
)  # fmt: skip


def mutant(seed: int, number: int) -> tuple[bytes, str]:
    """Mutant `number` of `seed`, and what was done to it."""
    rng = random.Random(f"{seed}:{number}")
    chosen = [(n, d) for n, d in originals() if n.startswith("tiff")] if rng.random() < 0.25 else originals()
    name, original = rng.choice(chosen)
    data = bytearray(original)
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if data:
            done.append(rng.choice(MUTATIONS)(data, rng))
    if rng.random() < 0.7:
        _png_sums(data)
    return bytes(data), f"{name}: {', '.join(done)}"


class Disagreement(Exception):
    """What must be equal is not, or what must not happen did."""


class Images(Surface):
    """Image files as `capacitor_rt.images` reads them."""

    name = "images"
    corpus = CORPUS

    def warm(self) -> None:
        # as the command line does
        warnings.filterwarnings("ignore", module=r"PIL\b")
        for _, data in originals():
            self._judge(data)

    def write(self, seed: int, number: int, folder: Path) -> str:
        data, what = mutant(seed, number)
        (folder / "image").write_bytes(data)
        return what

    def read(self, folder: Path) -> None:
        self._judge((folder / "image").read_bytes())

    def _judge(self, data: bytes) -> None:
        with _silence():
            first = _outcome(data, 0x00)
            if (again := _outcome(data, 0x55)) != first:
                raise Disagreement(f"not the same twice: {_words(first)}, then {_words(again)}")
            fast, jpeg.simplejpeg = jpeg.simplejpeg, None
            try:
                if (slow := _outcome(data, 0xAA)) != first:
                    raise Disagreement(f"by Pillow: {_words(slow)}, not {_words(first)}")
            finally:
                jpeg.simplejpeg = fast
            _check_memory(data)
        if isinstance(first[0], str):
            raise ImageError(first[0], "refused")


def _outcome(data: bytes, before: int) -> tuple:
    """Header and pixels in whole and in a bucket, or the reason why there are none; fresh memory holds `before`."""
    with _memory_of(before):
        try:
            decoded = decode_image(data, max_pixels=MAX_PIXELS)
        except ImageError as error:
            return (error.reason,)
        header, pixels = decoded.header, decoded.pixels
        if pixels.shape != (header.height, header.width, 3) or probe(data, max_pixels=MAX_PIXELS) != header:
            raise Disagreement(f"pixels {pixels.shape} under {header}")
        fast = PixelPolicy(decode="fast", max_pixels=MAX_PIXELS)
        _check_encoded(data)
        try:
            loaded = [load_image(data, policy, BUCKETS) for policy in (PixelPolicy(max_pixels=MAX_PIXELS), fast)]
        except ImageError as error:
            if error.reason != "too_large":
                raise Disagreement(f"decoded, but not loaded: {error}") from error
            return header, pixels.tobytes()
        return header, pixels.tobytes(), *(image.pixels.tobytes() for image in loaded)


def _check_encoded(data: bytes) -> None:
    """What a GPU would be given of an image has the pixels of the file itself."""
    out = np.empty(RECORD_BYTES, np.uint8)
    view = View(PixelPolicy("gpu", icc="ignore", max_pixels=MAX_PIXELS), tuple(BUCKETS))
    (loaded,) = load_encoded(data, [view], out) or (None,)
    if isinstance(loaded, ImageError) and loaded.reason != "too_large":
        raise Disagreement(f"decoded, but not handed on: {loaded}")
    if loaded is None or isinstance(loaded, ImageError):
        return
    record = read_encoded(loaded.pixels)
    assert record is not None
    stored = open_image(data, max_pixels=MAX_PIXELS).stored_pixels((0, 0, 0), icc="ignore")
    if not np.array_equal(exact_pixels(record.stream, name="stream"), stored):
        raise Disagreement("what a GPU is given has other pixels")


def _words(outcome: tuple) -> str:
    return str(outcome[0])


@contextmanager
def _memory_of(byte: int):
    """Have malloc fill what it gives and takes, so that reading what was never written shows."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_PERTURB, byte)
    try:
        yield
    finally:
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_PERTURB, 0)


@contextmanager
def _silence():
    """Nothing may be written to stderr, by whichever library."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        if text := file.read(300):
            raise Disagreement(f"on stderr: {text!r}")


def _check_memory(data: bytes) -> None:
    """Decoding takes no more memory than it asks for."""
    try:
        image = open_image(data, max_pixels=MAX_PIXELS)
    except ImageError:
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    with suppress(ImageError):
        load_image(data, PixelPolicy(max_pixels=MAX_PIXELS), BUCKETS)
    used = _resident("VmHWM") - before
    if used > image.memory + SPARE_BYTES:
        raise Disagreement(f"took {used >> 20} MiB where {image.memory >> 20} were announced")


def _resident(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{key}:"))
