"""What a WebDataset tar file holds: its images, and what lies beside each under the same key."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ...errors import CacheError
from ...images.scan import EXTENSIONS
from .columns import ColumnsRequest
from .remote import Files

MAX_BESIDE = 1 << 20
KEPT_BESIDE = 64 << 10
"""A larger member beside an image of a remote tar file is asked for when it is needed."""
MAX_HEADER = 1 << 16
"""Bytes of names and records about one member."""
MOST_HEADERS = 8
"""About one member."""
# a name on disk has at most 255 bytes; the library searches runs of digits in the square of their length
_LONG_RUN = re.compile(rb"\d{300}")
_ABOUT = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)

Beside = dict[str, "tuple[int, int] | bytes"]
"""By extension where a member beside an image begins and its bytes, or its contents."""


@dataclass
class Members:
    """The images of a tar file, in order.

    Attributes:
        beside: of each image; None where that was not looked at.
        ignored: number of other members by extension.
    """

    mtime: int
    names: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    beside: list[Beside] | None = None
    ignored: Counter[str] = field(default_factory=Counter)


def extensions(request: ColumnsRequest) -> set[str]:
    """Extensions of the members beside images that are wanted."""
    wanted = {"json"} if request.keep else set()
    return wanted | {
        name for name in (request.labels, request.captions) if name and "." not in name and "/" not in name
    }


def members(files: Files, name: bytes, wanted: set[str], *, keep: bool) -> Members:
    """The members of a tar file.

    Args:
        wanted: extensions of the members beside images that are of interest.
        keep: take the contents of these, which the file is at just now.

    Raises:
        CacheError: it cannot be read, or is damaged, cut short or compressed.
    """
    where = files.shown(name)
    images: dict[str, list[int]] = {}
    beside: dict[str, Beside] = {}
    try:
        size, mtime = files.info(name)
        found = Members(mtime, beside=[])
        with files.open(name) as file:
            for member in _each(file, size):
                folder, slash, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}{slash}{stem}"
                if base.startswith("._") or not member.isreg():
                    continue
                if f".{extension.lower()}".encode("utf-8", "surrogateescape") in EXTENSIONS:
                    images.setdefault(key, []).append(len(found.names))
                    found.names.append(member.name.encode("utf-8", "surrogateescape"))
                    found.sizes.append(member.size)
                    found.offsets.append(member.offset_data)
                elif extension in wanted:
                    place = member.offset_data, member.size
                    of_key = beside.setdefault(key, {})
                    of_key[extension] = _read(file, *place) if keep and member.size <= KEPT_BESIDE else place
                else:
                    found.ignored[extension] += 1
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as e:
        raise CacheError(f"{where} cannot be read as an uncompressed tar file ({e}): it is damaged or cut short") from e
    except OSError as e:
        raise CacheError(f"cannot read {where}: {e.strerror or e}") from e
    except Exception as e:
        # a network's libraries have errors of their own
        raise CacheError(f"cannot read {where}: {type(e).__name__}: {str(e)[:200]}") from e
    rows: list[Beside] = [{} for _ in found.names]
    for key, ordinals in images.items():
        for ordinal in ordinals:
            rows[ordinal] = beside.get(key, {})
    found.beside = rows
    return found


def _read(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


class _Header(tarfile.TarInfo):
    """A header in bounds: the library believes what it says of lengths, and reads headers about headers for ever."""

    def _proc_member(self, tar: Any) -> Any:
        if self.size < 0 or self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{self.name[:80]!r} has holes, or a length below 0")
        if self.type not in _ABOUT:
            return super()._proc_member(tar)  # type: ignore[misc]
        if self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes: the limit is {MAX_HEADER}")
        at = tar.fileobj.tell()
        body = tar.fileobj.read(self.size)
        tar.fileobj.seek(at)
        if b"GNU.sparse" in body or _LONG_RUN.search(body):
            raise tarfile.ReadError("a header tells of a file with holes, or of a number of 300 digits")
        tar.about = getattr(tar, "about", 0) + 1
        if tar.about > MOST_HEADERS:
            raise tarfile.ReadError(f"more than {MOST_HEADERS} headers about one member")
        try:
            # reads the next header, too
            return super()._proc_member(tar)  # type: ignore[misc]
        finally:
            tar.about -= 1


def _each(file: Any, size: int) -> Iterator[tarfile.TarInfo]:
    options = {"tarinfo": _Header, "encoding": "utf-8", "errors": "surrogateescape"}
    with tarfile.open(fileobj=file, mode="r:", **options) as members:  # type: ignore[call-overload]
        end = 0
        while (member := members.next()) is not None:
            # the library would keep them all
            members.members = []  # type: ignore[attr-defined]
            end = member.offset_data + member.size
            if end > size or member.size < 0:
                raise tarfile.ReadError(f"{member.name[:80]!r} goes on behind the end of the file")
            yield member
        file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        # what the library takes for the end may be a damaged header, or the place where the file was cut
        block = file.read(tarfile.BLOCKSIZE)
        if block != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header and no end mark at byte {file.tell() - len(block)}")
