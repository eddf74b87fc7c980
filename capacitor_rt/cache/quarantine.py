"""`quarantine.jsonl`: every input that could not be cached, with a typed reason. It is always made from the index."""

from __future__ import annotations

from pathlib import Path

from .durable import Commit, PendingFile, canonical_json
from .shards import read_index

QUARANTINE = "quarantine.jsonl"


def write_quarantine(out: Path, commits: dict[str, Commit]) -> None:
    """Make `quarantine.jsonl` anew from the index. A file that is right already is left untouched."""
    data = quarantine_bytes(out, commits)
    path = out / QUARANTINE
    if not path.exists() or path.read_bytes() != data:
        PendingFile(path, [data]).replace()


def quarantine_bytes(out: Path, commits: dict[str, Commit]) -> bytes:
    """What `quarantine.jsonl` says by the index: one line per input that is not cached, in the order of the inputs."""
    lines: list[tuple[int, bytes]] = []
    for commit in commits.values():
        if commit["inputs"] == commit["rows"]:
            continue
        table = read_index(out / commit["index"], commit["index_xxh3"])
        for row in table.select(["input", "id", "status", "reason", "message"]).to_pylist():
            if row["reason"] is not None:
                entry = {"path": row["id"], "reason": row["reason"], "message": row["message"]}
                lines.append((row["input"], canonical_json(entry) + b"\n"))
    return b"".join(line for _, line in sorted(lines))
