"""Files of latents that an update takes over from earlier generations: the rows in them are not written again.

The index of an update says in its column `file` in which of them a row lies. `carried-{plan8}.jsonl` says of each what
its header and its hash are, since the index and the log that it was written with are gone some day.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import CacheError
from ..schema import HEX32, HEX64, Invalid, ListOf, Number, Record
from ..strict_json import StrictJSONError, parse
from .folder import CacheFolder, PendingFile
from .hashing import canonical_json
from .latent_files import Layout, layout
from .plan import CachePlan

_MAX_BYTES = 1 << 30
_INPUT_BYTES = 64 << 10
"""Of the list for each input: one that has a file of its own adds a line, which names each bucket of that file."""
_COUNT = Number(0, 2**48)
_LINE = Record(
    {
        "plan": HEX64,
        "task": _COUNT,
        "index_xxh3": HEX32,
        "data_bytes": _COUNT,
        "data_xxh3": HEX32,
        "rows": ListOf(ListOf(Number(0, 2**31), 2, 2), most=1 << 16),
    }
)


class CarriedFile(NamedTuple):
    """A file of latents of an earlier generation.

    Attributes:
        plan, task: identity of the plan that it was written for, and its task there.
        index_xxh3: hash of the index that its header names.
        data_bytes, data_xxh3: of the file.
        rows: number of a bucket and its rows, in the order of the buckets.
    """

    plan: str
    task: int
    index_xxh3: str
    data_bytes: int
    data_xxh3: str
    rows: tuple[tuple[int, int], ...]

    @property
    def stem(self) -> str:
        """As the column `file` of an index names it."""
        return f"{self.plan[:8]}-{self.task:06d}"

    @property
    def name(self) -> str:
        """Relative to the cache."""
        return f"tasks/{self.stem}.safetensors"

    @property
    def counts(self) -> dict[int, int]:
        """Rows of each bucket that has any."""
        return dict(self.rows)

    def layout(self, plan: CachePlan) -> Layout:
        """Where everything lies in it. `plan`: of the generation that it is read for."""
        return layout(plan, self.task, self.counts, self.index_xxh3, self.plan)

    def line(self) -> bytes:
        return canonical_json(self._asdict()) + b"\n"


class Carried(dict[str, CarriedFile]):
    """The files that an update may refer to, by their stems, in order."""

    def __init__(self, files: Iterable[CarriedFile] = ()):
        super().__init__((file.stem, file) for file in sorted(files))

    def text(self) -> bytes:
        """The bytes of the list."""
        return b"".join(file.line() for file in self.values())

    def digest(self) -> str:
        """SHA-256 (hex) of the list."""
        return hashlib.sha256(self.text()).hexdigest()

    def save(self, folder: CacheFolder, plan: CachePlan) -> None:
        PendingFile(folder, plan.carried_name, [self.text()]).replace()


def load_carried(folder: CacheFolder, plan: CachePlan) -> Carried:
    """The files that a plan's rows may lie in beside its own; none for a cache that was never updated.

    Raises:
        CacheError: the list is missing or damaged.
    """
    if not plan.is_update:
        return Carried()
    path = folder.path / plan.carried_name
    try:
        data = folder.read(plan.carried_name, most_bytes(plan))
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: {_way_out(folder)}") from None
    if hashlib.sha256(data).hexdigest() != plan.fields["generation"]["carried"]:
        raise CacheError(f"{path} is damaged: {_way_out(folder)}")
    files = []
    try:
        for line in data.split(b"\n")[:-1]:
            files.append(parse_carried(line))
    except (StrictJSONError, Invalid) as e:
        raise CacheError(f"{path} is damaged ({e}): {_way_out(folder)}") from e
    if any(bucket >= len(plan.buckets) for file in files for bucket, _ in file.rows):
        raise CacheError(f"{path} is damaged: it has a bucket that is not of the plan")
    return Carried(files)


def most_bytes(plan: CachePlan) -> int:
    """Of the list, whatever size its file is said to have."""
    return min(_MAX_BYTES, (1 << 20) + _INPUT_BYTES * plan.count)


def parse_carried(line: bytes) -> CarriedFile:
    """What a line of the list says. Raises StrictJSONError or Invalid."""
    fields = parse(line)
    _LINE.check("", fields)
    return CarriedFile(**{**fields, "rows": tuple((b, n) for b, n in fields["rows"])})


def _way_out(folder: CacheFolder) -> str:
    return f"`capacitor-rt verify --repair {folder.path}` restores it from the files that it names"


def carried_nbytes(folder: CacheFolder, plan: CachePlan) -> int:
    """Bytes of the files of earlier generations that are there."""
    files = load_carried(folder, plan).values()
    return sum(info.st_size for file in files if (info := folder.stat(file.name)) is not None)
