"""Every image file under a folder, in an order that depends on nothing but their names."""

from __future__ import annotations

import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..errors import CacheError
from .packed_names import Names

# formats that cannot be decoded here are listed too: they are quarantined by name rather than passed over
EXTENSIONS = frozenset(
    b".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pnm .avif .heic .heif .jxl .jp2".split()
)
MISSING = -1


def path_to_id(path: bytes) -> str:
    """Relative path to text: a byte that is not UTF-8 becomes `\\xhh`, a backslash is doubled. Reversible."""
    return path.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def id_to_path(text: str) -> bytes:
    """Inverse of `path_to_id`."""
    unescape = re.compile(rb"\\(\\|x[0-9a-f]{2})")
    return unescape.sub(lambda m: b"\\" if m[1] == b"\\" else bytes([int(m[1][1:], 16)]), text.encode())


@dataclass(frozen=True)
class Scan:
    """Files found under `root`, sorted by the bytes of their relative POSIX path.

    `sizes` (bytes) and `mtimes` (ns) are int64 `[N]`, `MISSING` where the file cannot be read; `errors` then says
    why. `loops` are links to a folder that contains them, which are not followed; `ignored` counts files by
    extension that are no images.
    """

    root: bytes
    paths: Sequence[bytes]
    sizes: np.ndarray
    mtimes: np.ndarray
    errors: dict[bytes, str] = field(default_factory=dict)
    loops: list[bytes] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def locate(self, path: bytes) -> bytes:
        """Where the file of a relative path lies."""
        return os.path.join(self.root, path)


def scan(src: str | Path, skip: Path | None = None) -> Scan:
    """List the images of a folder and its subfolders (links are followed, loops are not), or a single file of any name.

    Args:
        src: folder or file.
        skip: a folder to leave out wherever it turns up: the cache itself, where it lies under `src`.

    Raises:
        CacheError: `src` is missing or cannot be listed, or holds no image.
    """
    root = os.fsencode(src)
    try:
        mode = os.stat(root).st_mode
        if stat.S_ISDIR(mode):
            os.scandir(root).close()
    except OSError as e:
        raise CacheError(f"cannot read {os.fsdecode(root)!r}: {e.strerror}") from e
    walk = _Walk(root if stat.S_ISDIR(mode) else os.path.dirname(root) or b".", skip)
    if stat.S_ISDIR(mode):
        paths = Names(walk.folders())
    else:
        paths = Names([walk.note(*walk.look(os.path.basename(root), lambda: os.stat(root)))])
    if not paths:
        ignored = ", ".join(f"{n} {ext or 'without extension'}" for ext, n in walk.ignored.most_common(5))
        raise CacheError(
            f"no images in {os.fsdecode(root)!r}"
            + (f" (other files: {ignored})" if ignored else "")
            + f": known extensions are {' '.join(sorted(e.decode() for e in EXTENSIONS))}"
        )
    return walk.result(paths)


class _Walk:
    def __init__(self, root: bytes, skip: Path | None):
        self.root = root
        self.skip = _identity(os.fsencode(skip)) if skip is not None else None
        self.numbers = array("q")
        self.errors: dict[bytes, str] = {}
        self.loops: list[bytes] = []
        self.ignored: Counter[str] = Counter()

    def folders(self) -> Iterator[bytes]:
        """Paths of files below the root, in order but for folders that cannot be listed."""
        # a stack of what is left of each folder: nothing grows with all files but their names
        open_ones = [self.entries(b"", frozenset())]
        while open_ones:
            found = next(open_ones[-1], None)
            if found is None:
                open_ones.pop()
            elif isinstance(found, bytes):
                yield found
            else:
                open_ones.append(self.entries(*found))

    def entries(
        self, folder: bytes, above: frozenset[_Identity]
    ) -> Iterator[bytes | tuple[bytes, frozenset[_Identity]]]:
        """Paths of the files of a folder, and of its folders with those above them, in the order of all below."""
        where = os.path.join(self.root, folder)
        identity = _identity(where)
        if identity in above:
            self.loops.append(folder)
            return
        if identity is not None and identity == self.skip:
            return
        files: list[tuple[bytes, int, int]] = []
        try:
            with os.scandir(where) as entries:
                for e in entries:
                    files += self.entry(folder, e)
        except OSError as e:
            # what lies below is not known, so it cannot be left out in silence
            yield self.note(*self.failed(folder, f"folder cannot be listed: {e.strerror}"))
            return
        # a folder comes where its slash puts what is below
        files.sort()
        for path, size, mtime in files:
            if path.endswith(b"/"):
                yield path[:-1], above | {identity}
            else:
                yield self.note(path, size, mtime)

    def entry(self, folder: bytes, entry: os.DirEntry[bytes]) -> list[tuple[bytes, int, int]]:
        """A directory entry's path, size and time, if it is an image; of a folder the path with a slash."""
        path = folder + b"/" + entry.name if folder else entry.name
        try:
            if entry.is_dir():
                return [(path + b"/", MISSING, MISSING)]
        except OSError:
            pass
        extension = os.path.splitext(entry.name)[1].lower()
        # what macOS keeps beside a file of another file system has that file's extension and no picture
        if extension in EXTENSIONS and not entry.name.startswith(b"._"):
            return [self.look(path, entry.stat)]
        self.ignored[os.fsdecode(extension)] += 1
        return []

    def look(self, path: bytes, look: Callable[[], os.stat_result]) -> tuple[bytes, int, int]:
        """A file's path, size and time."""
        try:
            info = look()
        except OSError as e:
            return self.failed(path, e.strerror or str(e))
        if not stat.S_ISREG(info.st_mode):
            return self.failed(path, "not a regular file")
        return path, info.st_size, info.st_mtime_ns

    def failed(self, path: bytes, message: str) -> tuple[bytes, int, int]:
        self.errors[path] = message
        return path, MISSING, MISSING

    def note(self, path: bytes, size: int, mtime: int) -> bytes:
        self.numbers.extend((size, mtime))
        return path

    def result(self, paths: Sequence[bytes]) -> Scan:
        numbers = np.frombuffer(self.numbers, np.int64).reshape(-1, 2)
        sizes, mtimes = numbers[:, 0].copy(), numbers[:, 1].copy()
        if self.errors and any(a > b for a, b in pairwise(paths)):
            # a folder that cannot be listed stands where it would if it could
            order = sorted(range(len(paths)), key=paths.__getitem__)
            paths, sizes, mtimes = Names(paths[i] for i in order), sizes[order], mtimes[order]
        return Scan(self.root, paths, sizes, mtimes, self.errors, sorted(self.loops), self.ignored)


_Identity = tuple[int, int] | None


def _identity(path: bytes) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino
