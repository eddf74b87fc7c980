"""Image files made on the spot (what Pillow cannot write, byte by byte), and what is asked of every decoding."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from capacitor_rt.errors import ImageError
from capacitor_rt.images.decode import decode_image, probe
from capacitor_rt.images.reasons import REASONS


def encoded(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 `[H,W,3]` with smooth parts, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / a + c) + np.cos(y / b - c) for a, b, c in ((7, 11, 0), (13, 5, 1), (4, 17, 2))]
    pixels = 128 + 50 * np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3))
    pixels[height // 3 :, width // 2 :] += 60
    return pixels.clip(0, 255).astype(np.uint8)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, color_type: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of raw `rows` (each with its filter byte); `extra` chunks stand before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*c) for c in chunks)


def png16(samples: np.ndarray, *extra: tuple[bytes, bytes]) -> bytes:
    """PNG of uint16 `[H,W,C]`, C of 1 to 4, rows under the Sub filter, which needs neighbours of the right distance."""
    height, width, channels = samples.shape
    raw = samples.astype(">u2").view(np.uint8).reshape(height, -1).astype(np.int16)
    step = 2 * channels
    raw[:, step:] = raw[:, step:] - raw[:, :-step].copy()
    rows = b"".join(b"\1" + row.astype(np.uint8).tobytes() for row in raw)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows, *extra)


def tiff16(
    samples: np.ndarray, *, big_endian: bool = False, deflate: bool = False, white_is_zero: bool = False
) -> bytes:
    """TIFF of uint16 `[H,W,1 or 3]` in one strip; `white_is_zero` only says so, for grey."""
    order = ">" if big_endian else "<"
    height, width, channels = samples.shape
    strip = samples.astype(order + "u2").tobytes()
    strip = zlib.compress(strip) if deflate else strip
    bits_at = 8 + len(strip) + len(strip) % 2
    directory_at = bits_at + 2 * channels
    short, long = 3, 4
    entries = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, channels, 16 if channels == 1 else bits_at),
        (259, short, 1, 8 if deflate else 1),
        (262, short, 1, 2 if channels == 3 else int(not white_is_zero)),
        (273, long, 1, 8),
        (277, short, 1, channels),
        (278, long, 1, height),
        (279, long, 1, len(strip)),
    ]
    directory = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        inline = (
            struct.pack(order + "HH", value, 0) if kind == short and count == 1 else struct.pack(order + "I", value)
        )
        directory += struct.pack(order + "HHI", tag, kind, count) + inline
    head = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(order + "I", directory_at)
    bits = struct.pack(order + f"{channels}H", *[16] * channels)
    return head + strip.ljust(bits_at - 8, b"\0") + bits + directory + bytes(4)


# where the 0th row and the 0th column of the stored picture lie in the upright one (EXIF 2.3, table 6)
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The picture as a file of this orientation holds it, pixel by pixel from the standard's table."""
    height, width = upright.shape[:2]
    row_side, column_side = ORIENTATIONS[orientation]
    turned = row_side in ("left", "right")
    rows, columns = (width, height) if turned else (height, width)
    out = np.empty((rows, columns, 3), np.uint8)
    for r in range(rows):
        for c in range(columns):
            at = {"top": r, "bottom": height - 1 - r, "left": r, "right": width - 1 - r}[row_side]
            across = {"top": c, "bottom": height - 1 - c, "left": c, "right": width - 1 - c}[column_side]
            y, x = (across, at) if turned else (at, across)
            out[r, c] = upright[y, x]
    return out


def exif(orientation: object) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def pixels_of(data: bytes, **options) -> np.ndarray:
    """Decoded pixels, after checks of form and of `probe`."""
    decoded = decode_image(data, **options)
    pixels, header = decoded.pixels, decoded.header
    assert pixels.dtype == np.uint8 and pixels.shape == (header.height, header.width, 3)
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    assert probe(data) == header
    return pixels


def reason_of(data: bytes, **options) -> str:
    """Why `data` cannot be decoded."""
    with pytest.raises(ImageError) as caught:
        decode_image(data, **options)
    assert caught.value.reason in REASONS
    return caught.value.reason


# XYZ of red, green and blue under D50
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def icc_profile(primaries: tuple = DISPLAY_P3, gamma: float | None = None, space: bytes = b"RGB ") -> bytes:
    """A display profile: of matrix and curves (sRGB's, or a power), or of a grey curve for space b"GRAY"."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))

    if gamma is None:
        curve = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    else:
        curve = b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + fixed(gamma)
    text = b"mluc\0\0\0\0" + struct.pack(">IIHHII", 1, 12, 0x656E, 0x5553, 2, 28) + b"\0t\0\0"
    tags = {b"desc": text, b"cprt": text, b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for color, xyz in zip(b"rgb", primaries, strict=True):
            tags[bytes([color]) + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*xyz)
            tags[bytes([color]) + b"TRC"] = curve
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = bytearray(128)
    head[0:4] = struct.pack(">I", at + len(body))
    head[8:12], head[12:16], head[16:20], head[20:24], head[36:40] = b"\4\x20\0\0", b"mntr", space, b"XYZ ", b"acsp"
    head[68:80] = fixed(0.9642, 1.0, 0.8249)
    return bytes(head) + table + body
