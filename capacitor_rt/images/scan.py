"""Every image file under a folder, in an order that depends on nothing but their names."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import CacheError

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
    paths: list[bytes]
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
        walk.folders()
    else:
        walk.add(os.path.basename(root), lambda: os.stat(root))
    if not walk.found:
        ignored = ", ".join(f"{n} {ext or 'without extension'}" for ext, n in walk.ignored.most_common(5))
        raise CacheError(
            f"no images in {os.fsdecode(root)!r}"
            + (f" (other files: {ignored})" if ignored else "")
            + f": known extensions are {' '.join(sorted(e.decode() for e in EXTENSIONS))}"
        )
    return walk.result()


class _Walk:
    def __init__(self, root: bytes, skip: Path | None):
        self.root = root
        self.skip = _identity(os.fsencode(skip)) if skip is not None else None
        self.found: list[tuple[bytes, int, int]] = []
        self.errors: dict[bytes, str] = {}
        self.loops: list[bytes] = []
        self.ignored: Counter[str] = Counter()

    def folders(self) -> None:
        pending: list[tuple[bytes, frozenset[tuple[int, int] | None]]] = [(b"", frozenset())]
        while pending:
            folder, above = pending.pop()
            where = os.path.join(self.root, folder)
            identity = _identity(where)
            if identity in above:
                self.loops.append(folder)
                continue
            if identity is not None and identity == self.skip:
                continue
            try:
                with os.scandir(where) as entries:
                    subfolders = [path for e in entries if (path := self.entry(folder, e)) is not None]
            except OSError as e:
                # what lies below is not known, so it cannot be left out in silence
                self.fail(folder, f"folder cannot be listed: {e.strerror}")
                continue
            pending += [(path, above | {identity}) for path in subfolders]

    def entry(self, folder: bytes, entry: os.DirEntry[bytes]) -> bytes | None:
        """Take note of a directory entry; its path if it is a folder."""
        path = folder + b"/" + entry.name if folder else entry.name
        try:
            if entry.is_dir():
                return path
        except OSError:
            pass
        extension = os.path.splitext(entry.name)[1].lower()
        # what macOS keeps beside a file of another file system has that file's extension and no picture
        if extension in EXTENSIONS and not entry.name.startswith(b"._"):
            self.add(path, entry.stat)
        else:
            self.ignored[os.fsdecode(extension)] += 1
        return None

    def add(self, path: bytes, look: Callable[[], os.stat_result]) -> None:
        try:
            info = look()
        except OSError as e:
            self.fail(path, e.strerror or str(e))
            return
        if not stat.S_ISREG(info.st_mode):
            self.fail(path, "not a regular file")
            return
        self.found.append((path, info.st_size, info.st_mtime_ns))

    def fail(self, path: bytes, message: str) -> None:
        self.found.append((path, MISSING, MISSING))
        self.errors[path] = message

    def result(self) -> Scan:
        self.found.sort()
        numbers = np.array([f[1:] for f in self.found], dtype=np.int64).reshape(-1, 2)
        paths = [f[0] for f in self.found]
        return Scan(self.root, paths, numbers[:, 0], numbers[:, 1], self.errors, sorted(self.loops), self.ignored)


def _identity(path: bytes) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino
