"""Mutators of images by their segments: the chunks of PNG and RIFF, the markers of JPEG, and what they hold packed."""

from __future__ import annotations

import random
import struct
import zlib

Spans = list[tuple[int, int]]
PNG = b"\x89PNG\r\n\x1a\n"


def spans(data: bytes) -> Spans:
    """Begins and ends of the segments of an image, as far as they can be told."""
    found: Spans = []
    if data.startswith(PNG):
        at = len(PNG)
        while at + 12 <= len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            if end > len(data):
                break
            found.append((at, end))
            at = end
    elif data.startswith(b"\xff\xd8"):
        at = 2
        while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if end > len(data):
                break
            found.append((at, end))
            at = end
    elif data.startswith(b"RIFF"):
        at = 12
        while at + 8 <= len(data):
            size = int.from_bytes(data[at + 4 : at + 8], "little")
            end = at + 8 + size + size % 2
            if end > len(data):
                break
            found.append((at, end))
            at = end
    return found


def edit_segments(data: bytearray, rng: random.Random) -> str:
    """A segment dropped, repeated, moved, or said to be longer or shorter."""
    found = spans(data)
    if not found:
        return "no segments"
    begin, end = rng.choice(found)
    piece, what = bytes(data[begin:end]), rng.randrange(5)
    if what == 0:
        del data[begin:end]
    elif what == 1:
        data[end:end] = piece * rng.choice((1, 2, 300))
    elif what == 2:
        del data[begin:end]
        at = rng.choice([b for b, _ in spans(data)] or [len(data)])
        data[at:at] = piece
    elif what == 3:
        kind = begin + 1 if data.startswith(b"\xff\xd8") else begin + (4 if data.startswith(PNG) else 0)
        data[kind] = rng.choice((0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xE1, 0xE2, 0xEE, 0xFE, data[kind] ^ 0x20))
    else:
        order, at = ("<I", begin + 4) if data.startswith(b"RIFF") else (">I", begin)
        if data.startswith(b"\xff\xd8"):
            order, at = ">H", begin + 2
        size = struct.unpack_from(order, data, at)[0] + rng.choice((-9, -1, 1, 2, 1000))
        struct.pack_into(order, data, at, size % (1 << 8 * struct.calcsize(order)))
    return f"segment at {begin}, edit {what}"


def add_packed(data: bytearray, rng: random.Random) -> str:
    """A segment that says much more than it takes: packed text and profiles, or very many of them."""
    found = spans(data)
    if data.startswith(PNG) and found:
        packed = zlib.compress(bytes(rng.choice((1 << 16, 1 << 24, 1 << 28))), 9)
        kind, body = rng.choice(
            (
                (b"iCCP", b"p\0\0" + packed),
                (b"zTXt", b"k\0\0" + packed),
                (b"iTXt", b"k\0\1\0\0\0" + packed),
                (b"eXIf", b"II*\0" + struct.pack("<I", 8) + b"\xff" * 60),
                (b"acTL", struct.pack(">II", rng.choice((0, 1, 2**31 - 1, 2**32 - 1)), 0)),
                (b"tRNS", bytes(rng.choice((1, 2, 6, 256, 257)))),
                (b"PLTE", bytes(rng.choice((1, 3, 768, 771)))),
            )
        )
        piece = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    elif data.startswith(b"\xff\xd8") and found:
        kind, body = rng.choice(
            (
                (
                    0xE2,
                    b"ICC_PROFILE\0" + bytes((rng.randrange(4), rng.randrange(4))) + bytes(rng.choice((0, 128, 60000))),
                ),
                (0xE1, b"Exif\0\0II*\0" + struct.pack("<IH", 8, rng.choice((1, 5000, 65535))) + b"\x12\x01" * 6),
                (0xDD, struct.pack(">H", rng.choice((0, 1, 65535)))),
                (0xDB, bytes((rng.choice((0, 3, 0x10, 0xFF)),)) + bytes(rng.choice((64, 128, 10)))),
                (0xC4, bytes((rng.choice((0, 0x11, 0x1F)),)) + rng.randbytes(16) + bytes(rng.choice((0, 200, 3000)))),
            )
        )
        piece = bytes((0xFF, kind)) + struct.pack(">H", len(body) + 2) + body
    else:
        return "no place for it"
    at = rng.choice(found)[rng.randrange(2)]
    data[at:at] = piece * rng.choice((1, 1, 1, 2, 500 if len(piece) < 200 else 2))
    return f"{kind!r} of {len(piece)} bytes at {at}"
