"""`quarantine.jsonl`: every input that could not be cached, with a typed reason. It is always made from the index."""

from __future__ import annotations

from contextlib import suppress

from ..errors import CacheError
from .commits import Commit
from .folder import CacheFolder, PendingFile
from .hashing import canonical_json
from .plan import CachePlan
from .store import read_index

QUARANTINE = "quarantine.jsonl"


def write_quarantine(folder: CacheFolder, plan: CachePlan, commits: dict[int, Commit]) -> None:
    """Make `quarantine.jsonl` anew from the index. A file that is right already is left untouched. Under the mutex."""
    data = quarantine_bytes(folder, plan, commits)
    if not is_quarantine(folder, data):
        PendingFile(folder, QUARANTINE, [data]).replace()


def is_quarantine(folder: CacheFolder, data: bytes) -> bool:
    """Whether these bytes are those of the file, of which no more is read."""
    with suppress(OSError, CacheError):
        return folder.read(QUARANTINE, len(data)) == data
    return False


def quarantine_bytes(folder: CacheFolder, plan: CachePlan, commits: dict[int, Commit]) -> bytes:
    """What `quarantine.jsonl` says by the index: one line per input that is not cached, in the order of the inputs."""
    lines: list[bytes] = []
    for _, commit in sorted(commits.items()):
        if commit.inputs == commit.rows:
            continue
        table = read_index(folder, plan, commit)
        for row in table.select(["id", "reason", "message"]).to_pylist():
            if row["reason"] is not None:
                entry = {"path": row["id"], "reason": row["reason"], "message": row["message"]}
                lines.append(canonical_json(entry) + b"\n")
    return b"".join(lines)
