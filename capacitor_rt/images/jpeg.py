"""The common JPEG without Pillow: its header by a walk over the markers, its pixels by simplejpeg.

Pillow stays the judge: whatever is unusual (other processes than Huffman's baseline, extended and progressive, odd
lengths, two headers, MPO, an orientation in XMP alone) or makes simplejpeg object is left to it. simplejpeg is
libjpeg-turbo with the accurate DCT and smooth chroma, as in Pillow, and gives the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

_SOF = {0xC0, 0xC1, 0xC2}
_PROGRESSIVE = 0xC2
# tables, restart interval and comment: nothing here depends on them
_PASSED = {0xC4, 0xDB, 0xDD, 0xFE}
_SCAN = 0xDA
_ORIENTATION = 0x0112
_SHORT = 3
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_EXIF, _XMP, _ICC, _MPF = b"Exif\0\0", b"http://ns.adobe.com/xap/", b"ICC_PROFILE\0", b"MPF\0"
MOST_SHRINK = 3
"""Decoding at 1/2^k of the size goes to k = 3."""


@dataclass(frozen=True)
class JpegHeader:
    """`width` and `height` as stored; `orientation` 1-8; `components` 1 or 3; `profile`: ICC, empty if absent."""

    width: int
    height: int
    components: int
    progressive: bool
    orientation: int
    profile: bytes


def read_header(data: bytes) -> JpegHeader | None:
    """Header of a usual JPEG; None if it is not one, for Pillow to judge."""
    if simplejpeg is None or data[:2] != b"\xff\xd8":
        return None
    frame: tuple[int, int, int, bool] | None = None
    exif: bytes | None = None
    profiles: list[bytes] = []
    at = 2
    while True:
        head = data[at : at + 4]
        if len(head) < 4 or head[0] != 0xFF:
            return None
        marker, length = head[1], head[2] << 8 | head[3]
        at, body = at + 2 + length, at + 4
        if length < 2 or at > len(data):
            return None
        if marker in _PASSED:
            continue
        if marker == _SCAN:
            break
        if marker in _SOF:
            if frame is not None or (frame := _frame(data[body:at], marker)) is None:
                return None
        elif marker == 0xE1:
            if data.startswith(_EXIF, body):
                if exif is not None:
                    return None
                exif = data[body + len(_EXIF) : at]
            elif not data.startswith(_XMP, body) or b"tiff:Orientation" in data[body:at]:
                return None
        elif marker == 0xE2:
            if data.startswith(_ICC, body):
                if frame is not None:
                    # Pillow puts the profile together when it meets the frame
                    return None
                profiles.append(data[body + len(_ICC) : at])
            elif data.startswith(_MPF, body):
                return None
        elif not 0xE0 <= marker <= 0xEF or _is_odd(data[body:at], marker):
            return None
    if frame is None:
        return None
    orientation = 1 if exif is None else _orientation(exif)
    profile = _joined(profiles)
    if orientation is None or profile is None:
        return None
    return JpegHeader(*frame, orientation, profile)


def decode(
    data: bytes, header: JpegHeader, shrink: int = 0, buffer: bytearray | memoryview | None = None
) -> np.ndarray | None:
    """uint8 `[H,W,3]` at 1/2^shrink of the size, rounded up, not yet turned; None if simplejpeg objects.

    Args:
        shrink: 0 to `MOST_SHRINK`; left to the DCT.
        buffer: memory for the pixels, if it is large enough.
    """
    if simplejpeg is None:
        return None
    height, width = shrunk(header.height, shrink), shrunk(header.width, shrink)
    options: dict[str, Any] = {}
    try:
        if shrink:
            # it takes the smallest of M/8 that is as large: asked for the very size, 1/2^k
            options |= {"min_height": height, "min_width": width, "min_factor": 1 << shrink}
        if buffer is not None and len(buffer) >= height * width * 3:
            options["buffer"] = memoryview(buffer)[: height * width * 3]
        pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True, **options)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def shrunk(side: int, shrink: int) -> int:
    """A side of the picture as the DCT shrinks it by 2^shrink."""
    return -(-side >> shrink)


def _frame(body: bytes, marker: int) -> tuple[int, int, int, bool] | None:
    """Width, height, components, and whether progressive."""
    if len(body) < 6:
        return None
    components = body[5]
    if body[0] != 8 or components not in (1, 3) or len(body) != 6 + 3 * components:
        return None
    height, width = body[1] << 8 | body[2], body[3] << 8 | body[4]
    return (width, height, components, marker == _PROGRESSIVE) if height and width else None


def _is_odd(body: bytes, marker: int) -> bool:
    """Segments that Pillow reads more of than is read here."""
    return (marker == 0xE0 and len(body) < 14) or (marker == 0xEE and len(body) < 12) or marker == 0xED


def _joined(segments: list[bytes]) -> bytes | None:
    """A profile from its numbered segments; None if one is missing or too much."""
    if not segments:
        return b""
    if any(len(s) < 2 or s[1] != len(segments) for s in segments):
        return None
    if sorted(s[0] for s in segments) != list(range(1, len(segments) + 1)):
        return None
    return b"".join(s[2:] for s in sorted(segments, key=lambda s: s[0]))


def _orientation(tiff: bytes) -> int | None:
    """Of the first directory; 1 if it has none; None if it is odd."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return None
    little = order == "little"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], "little" if little else "big")

    start = number(4, 4)
    count = number(start, 2)
    end = start + 2 + 12 * count
    if start < 8 or end > len(tiff):
        return None
    found = 1
    seen = False
    for at in range(start + 2, end, 12):
        size = _TYPE_BYTES.get(number(at + 2, 2), 0) * number(at + 4, 4)
        if size > 4 and number(at + 8, 4) + size > len(tiff):
            return None
        if number(at, 2) == _ORIENTATION:
            if seen or number(at + 2, 2) != _SHORT or number(at + 4, 4) != 1:
                return None
            seen, found = True, number(at + 8, 2)
    return found if 1 <= found <= 8 else 1
