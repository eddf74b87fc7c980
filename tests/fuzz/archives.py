"""Tar files in parts that can be edited: any field of any header, records of PAX, and names that are none."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

BLOCK = 512
NAMES = (
    b"../out.png", b"../../../../etc/passwd.png", b"/etc/motd.png", b".png", b"._a.png", b"a/../b.png", b"./a.png",
    b"a\nb.png", b"\x1b[2J\x07.png", b"\xff\xfe.png", b"\xed\xa0\x80.png", "\u202egnp.a\u0301.png".encode(),
    b"a//b.png",
    b"a.tar/b.png", b"a.b.c.png", b"x" * 99 + b".png", b" .png", b"a\\b.png", b"con.png", b"0.png", b"1.txt", b"2.json",
    b"1.cls", b"a.PNG", b"*.png", b"%s.png", b"-rf.png", b"a/", b"", b".", b"..", b"/",
)  # fmt: skip
LONG = (b"n" * 300 + b".png", b"d/" * 2000 + b"a.png", b"x" * 70_000 + b".png", b"a\0b.png", b"\n=.png", *NAMES)
SIZES = (
    0,
    1,
    3,
    511,
    512,
    513,
    10**6,
    8**11 - 1,
    2**31,
    2**40,
    2**62,
    2**63,
    2**70,
    -1,
    -512,
    -513,
    -(2**40),
    -(2**63),
)
TYPES = tuple(bytes([c]) for c in b"01234567ALKgxXSDMNVEI\x00\x01\xff ")
KEYS = (
    "path", "linkpath", "size", "mtime", "uid", "hdrcharset", "GNU.sparse.map", "GNU.sparse.size",
    "GNU.sparse.realsize",
    "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.name", "GNU.sparse.numblocks", "GNU.sparse.offset", "comment",
)  # fmt: skip
VALUES = (
    b"", b"0", b"1", b"-1", b"7", b"1e999", b"nan", b"9" * 30, b"9" * 5000, b"0,512", b"0,1,2", b"-1,-1", b"BINARY",
    b"1" * 60_000, b"x" * 60_000, b"\xff", b"\0", b"a" * 300 + b".png", b"../x.png",
)  # fmt: skip


@dataclass
class Member:
    """A header and its data; what is None is made to fit."""

    name: bytes
    data: bytes
    kind: bytes = b"0"
    size: int | None = None
    magic: bytes = b"ustar\00000"
    checksum: int | None = None
    prefix: bytes = b""
    link: bytes = b""
    sparse: bytes = b""
    before: list[Member] = field(default_factory=list)

    def bytes(self) -> bytes:
        parts = [member.bytes() for member in self.before]
        size = len(self.data) if self.size is None else self.size
        head = bytearray(BLOCK)
        head[0:100] = self.name[:100].ljust(100, b"\0")
        head[100:124] = b"0000644\0" + b"0000000\0" * 2
        head[124:136] = _number(size)
        head[136:148] = b"00000000000\0"
        head[156:157] = self.kind
        head[157:257] = self.link[:100].ljust(100, b"\0")
        head[257:265] = self.magic
        head[345:500] = self.prefix[:155].ljust(155, b"\0")
        if self.sparse:
            head[345 : 345 + len(self.sparse)] = self.sparse[:155]
        head[148:156] = b" " * 8
        total = sum(head) if self.checksum is None else self.checksum
        head[148:156] = b"%06o\0 " % total
        return b"".join([*parts, bytes(head), self.data, bytes(-len(self.data) % BLOCK)])


def _number(value: int) -> bytes:
    """A number in octal digits, or in base 256 where they do not do."""
    if 0 <= value < 8**11:
        return b"%011o\0" % value
    return (b"\xff" if value < 0 else b"\x80") + (value % 2**88).to_bytes(11, "big")


def archive(members: list[Member]) -> bytes:
    return b"".join(member.bytes() for member in members) + bytes(2 * BLOCK)


def pax(*records: tuple[str, bytes], kind: bytes = b"x") -> Member:
    """A header of PAX records, of each of which the length counts itself."""
    body = b""
    for key, value in records:
        rest = b" %s=%s\n" % (key.encode(), value)
        length = len(rest) + 1
        while len(b"%d" % length) + len(rest) != length:
            length = len(b"%d" % length) + len(rest)
        body += b"%d" % length + rest
    return Member(b"PaxHeaders/x", body, kind)


def long_name(name: bytes) -> Member:
    return Member(b"././@LongLink", name + b"\0", b"L")


def rename(members: list[Member], rng: random.Random) -> str:
    member, name = rng.choice(members), rng.choice(LONG)
    how = rng.randrange(4)
    if how == 0:
        member.before.append(pax(("path", name)))
    elif how == 1:
        member.before.append(long_name(name))
    elif how == 2:
        member.prefix = rng.choice((b"..", b"/", b"a/b", b"p" * 155, b"\xff"))
    else:
        member.name = name
    return f"named {name[:30]!r}"


def twice(members: list[Member], rng: random.Random) -> str:
    member = rng.choice(members)
    members.insert(rng.randint(0, len(members)), member)
    return f"{member.name!r} twice"


def kind(members: list[Member], rng: random.Random) -> str:
    member = rng.choice(members)
    member.kind = rng.choice(TYPES)
    member.link = rng.choice((b"", b"0.png", b"/etc/passwd", b"../x"))
    return f"{member.name!r} of type {member.kind!r}"


def size(members: list[Member], rng: random.Random) -> str:
    member = rng.choice(members)
    member.size = rng.choice((*SIZES, len(member.data) + rng.choice((-1, 1, 512))))
    return f"{member.name!r} of {member.size} bytes"


def magic(members: list[Member], rng: random.Random) -> str:
    member = rng.choice(members)
    member.magic = rng.choice((b"ustar  \0", b"\0" * 8, b"ustar\0\xff\xff", b"xxxxx\0\0\0"))
    if rng.random() < 0.3:
        member.checksum = rng.choice((0, 1, 8**6 - 1))
    return f"{member.name!r} with magic {member.magic!r}"


def records(members: list[Member], rng: random.Random) -> str:
    found = [(rng.choice(KEYS), rng.choice(VALUES)) for _ in range(rng.choice((1, 1, 2, 3)))]
    rng.choice(members).before.append(pax(*found, kind=rng.choice((b"x", b"x", b"x", b"g", b"X"))))
    return f"records {', '.join(key for key, _ in found)}"


def raw_records(members: list[Member], rng: random.Random) -> str:
    """A PAX header that is no list of records: its digits are what a careless pattern is slow at."""
    body = rng.choice(
        (b"1" * 100_000, b"9 " * 30_000, b"0" * 30_000 + b" a=b\n", b"12 a=b\n", b"=\n" * 9000, b"\0" * 9000)
    )
    rng.choice(members).before.append(Member(b"x", body, b"x"))
    return f"{len(body)} bytes that are no records"


def chain(members: list[Member], rng: random.Random) -> str:
    """Headers about headers about headers."""
    count = rng.choice((2, 50, 400, 3000))
    one = rng.choice((long_name(b"a.png"), pax(("path", b"a.png")), pax(("size", b"3")), Member(b"k", b"x\0", b"K")))
    rng.choice(members).before += [one] * count
    return f"{count} headers of type {one.kind!r}"


def sparse(members: list[Member], rng: random.Random) -> str:
    """A file with holes, in GNU's old form: its parts, and how many more headers follow."""
    member = rng.choice(members)
    member.kind, member.magic = b"S", b"ustar  \0"
    parts = b"".join(_number(rng.choice((0, 1, 512, 2**40, -1))) for _ in range(8))
    member.sparse = bytes(41) + parts + rng.choice((b"\0", b"\1")) + _number(rng.choice(SIZES))
    return f"{member.name!r} with holes"


def order(members: list[Member], rng: random.Random) -> str:
    rng.shuffle(members)
    del members[rng.choice((len(members), 1, 2)) :]
    return f"{len(members)} members in another order"


EDITS: tuple[Callable[[list[Member], random.Random], str], ...] = (
    rename, rename, rename, twice, kind, kind, size, size, magic, records, records, raw_records, chain, sparse, order,
)  # fmt: skip


def lengths(data: bytes, rng: random.Random) -> bytes:
    """Cut, or with something behind the end."""
    what = rng.randrange(4)
    if what == 0:
        return data[: rng.randrange(len(data)) // BLOCK * BLOCK]
    if what == 1:
        return data[: rng.randrange(len(data))]
    if what == 2:
        return data[:-BLOCK] if rng.random() < 0.5 else data + rng.randbytes(BLOCK)
    return struct.pack("<I", 0x8088B1F) + data
