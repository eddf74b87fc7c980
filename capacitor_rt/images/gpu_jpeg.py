"""Which JPEGs a GPU decodes, and what of them it is given: a function of the file's bytes alone.

A GPU takes what every decoder agrees about: baseline, three components that are Y, Cb and Cr beyond doubt, in one scan,
with chroma of 4:4:4, 4:2:2, 4:2:0 or 4:4:0. All else is decoded by the CPU, and so is what may be damaged: a GPU fills
what is missing with grey, or with whatever its memory held, and says nothing. So the scan is walked over here: it has
to be as long as its blocks need at least, to hold the restart markers that belong there and no others, to have no hole
that was never written, and to end. Damage that leaves all of this whole is not seen, here as elsewhere.

The GPU is given tables, frame and scan. Metadata, and what lies behind the picture, never reach it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MOST_PIXELS = 1 << 25
"""Width times height. Larger pictures would hold up those of their batch."""
MOST_SIDE = 8192
LEAST_SIDE = 16
_SAMPLING = {(1, 1), (2, 1), (2, 2), (1, 2)}
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_FRAME, _HUFFMAN, _QUANTIZATION, _INTERVAL, _SCAN, _ADOBE = 0xC0, 0xC4, 0xDB, 0xDD, 0xDA, 0xEE
_COMPONENTS = (1, 2, 3)
# codes have ones among them: so many bytes of zeros are a part of the file that never arrived
_HOLE = bytes(512)
_ADOBE_YCBCR = 1
# bytes of Huffman tables; those of the standard have 420
_MOST_CACHED = 1024


@dataclass
class _Frame:
    width: int
    height: int
    sampling: tuple[int, int]
    tables: tuple[int, ...]

    @property
    def mcus(self) -> int:
        h, v = self.sampling
        return -(-self.width // (8 * h)) * -(-self.height // (8 * v))


def stream_of(data: bytes) -> bytes | None:
    """What a GPU is given of a JPEG, which is a JPEG itself and has the same pixels; None if the CPU decodes it."""
    if data[:2] != _SOI:
        return None
    frame: _Frame | None = None
    interval, at = 0, 2
    codes = dict[tuple[int, int], int]()
    quantizers: set[int] = set()
    parts = [_SOI]
    while True:
        if len(data) < at + 4 or data[at] != 0xFF:
            return None
        marker, end = data[at + 1], at + 2 + (data[at + 2] << 8 | data[at + 3])
        body = data[at + 4 : end]
        if end > len(data) or end < at + 4:
            return None
        if marker == _FRAME:
            if frame is not None or (frame := _frame(body)) is None:
                return None
        elif marker == _HUFFMAN:
            if (tables := _standard_codes(body) if len(body) <= _MOST_CACHED else _read_codes(body)) is None:
                return None
            codes |= tables
        elif marker == _QUANTIZATION:
            if not _read_quantizers(body, quantizers):
                return None
        elif marker == _INTERVAL:
            if len(body) != 2:
                return None
            interval = body[0] << 8 | body[1]
        elif marker == _SCAN:
            break
        elif marker == _ADOBE:
            if body[:5] == b"Adobe" and (len(body) < 12 or body[11] != _ADOBE_YCBCR):
                return None
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            # other processes, arithmetic coding, lines counted later
            return None
        if marker in (_FRAME, _HUFFMAN, _QUANTIZATION, _INTERVAL):
            parts.append(data[at:end])
        at = end
    if frame is None or not quantizers.issuperset(frame.tables):
        return None
    bits = _least_bits(body, frame, codes)
    stop = None if bits is None else _end_of_scan(data, end, frame.mcus, interval)
    if bits is None or stop is None or 8 * (stop - end) < bits:
        return None
    return b"".join((*parts, data[at:stop], _EOI))


def _frame(body: bytes) -> _Frame | None:
    if len(body) != 15 or body[0] != 8 or tuple(body[6::3]) != _COMPONENTS:
        return None
    height, width = body[1] << 8 | body[2], body[3] << 8 | body[4]
    h, v = body[7] >> 4, body[7] & 15
    if (h, v) not in _SAMPLING or body[10] != 0x11 or body[13] != 0x11:
        return None
    if not (min(height, width) >= LEAST_SIDE and max(height, width) <= MOST_SIDE and height * width <= MOST_PIXELS):
        return None
    return _Frame(width, height, (h, v), tuple(body[8::3]))


def _read_codes(body: bytes) -> dict[tuple[int, int], int] | None:
    """Bits of the shortest code of each table, by class and number; None if not all is as it should be."""
    codes, at = dict[tuple[int, int], int](), 0
    while at < len(body):
        counts = body[at + 1 : at + 17]
        end = at + 17 + sum(counts)
        kind, number = body[at] >> 4, body[at] & 15
        if len(counts) < 16 or end > len(body) or kind > 1 or number > 1 or not any(counts):
            return None
        # no more codes than the tree has room for
        if sum(count << (15 - i) for i, count in enumerate(counts)) > 1 << 16:
            return None
        codes[kind, number] = next(i + 1 for i, count in enumerate(counts) if count)
        at = end
    return codes


# most files have the tables of the standard
_standard_codes = lru_cache(maxsize=64)(_read_codes)


def _read_quantizers(body: bytes, numbers: set[int]) -> bool:
    """Add the numbers of the tables, which have 8 bits and no zeros. Whether that is so."""
    for at in range(0, len(body), 65):
        if body[at] > 3 or len(body) < at + 65 or 0 in body[at + 1 : at + 65]:
            return False
        numbers.add(body[at])
    return True


def _least_bits(body: bytes, frame: _Frame, codes: dict[tuple[int, int], int]) -> int | None:
    """Bits that the scan has at least, by its header; None if that is not one of a whole baseline picture.

    A block is a code for its mean and at least one for the rest.
    """
    if len(body) != 10 or body[0] != 3 or tuple(body[1:7:2]) != _COMPONENTS or body[7:] != b"\x00\x3f\x00":
        return None
    bits = 0
    for tables, blocks in zip(body[2:7:2], (frame.sampling[0] * frame.sampling[1], 1, 1), strict=True):
        dc, ac = codes.get((0, tables >> 4)), codes.get((1, tables & 15))
        if dc is None or ac is None:
            return None
        bits += blocks * (dc + ac)
    return bits * frame.mcus


def _end_of_scan(data: bytes, begin: int, mcus: int, interval: int) -> int | None:
    """Where the end marker stands; None if others than the restarts that belong there come before it, or none."""
    if data.find(_HOLE, begin) >= 0:
        return None
    values = np.frombuffer(data, np.uint8)[begin:]
    places = np.flatnonzero(values[:-1] == 0xFF)
    follows = values[places + 1]
    places, follows = places[follows != 0], follows[follows != 0]
    restarts = -(-mcus // interval) - 1 if interval else 0
    if len(places) <= restarts or follows[restarts] != _EOI[1]:
        return None
    if restarts and (follows[:restarts] != 0xD0 + np.arange(restarts) % 8).any():
        return None
    return begin + int(places[restarts])
