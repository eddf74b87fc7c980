"""Where a page is written: never over anything that is not a page of ours, and not seen before it is whole."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

from ...errors import InputError

FORMAT = "capacitor-view/1"
MANIFEST = "page.json"


def read_manifest(folder: Path) -> list[str] | None:
    """Files of the page that a folder holds, relative POSIX paths, its manifest included; None where it holds none."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("files"), list):
        return None
    names = [name for name in found["files"] if isinstance(name, str) and _is_inside(name)]
    return names if len(names) == len(found["files"]) else None


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts)


def check_out(out: Path) -> None:
    """Refuse a place where a page would overwrite what is not a page.

    Raises:
        InputError: `out` is no folder, or holds other files than those of a page of ours.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise InputError(f"{str(out)!r} exists and is not a folder: give another --out")
    strange = _strangers(out)
    if strange is not None:
        raise InputError(
            f"{str(out)!r} holds {strange!r}, which is no part of a page made here: give another --out, or an empty one"
        )


def _strangers(out: Path) -> str | None:
    """A file in `out` that no page of ours has there, None where there is none."""
    listed = set(read_manifest(out) or ())
    for where, folders, names in os.walk(out):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        for name in (*names, *links):
            path = os.path.relpath(os.path.join(where, name), out)
            if path not in listed:
                return path
    return None


class Staging:
    """A folder beside `out` in which a page grows; `publish` puts it in the place of `out`, `discard` removes it."""

    def __init__(self, out: Path):
        check_out(out)
        # a link is followed, so that it goes on pointing at the page
        self.out = Path(os.path.realpath(out))
        self.folder = self.out.with_name(f"{self.out.name}.tmp-{uuid.uuid4().hex}")
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"cannot make a folder beside {out}: {error.strerror}: give another --out") from error

    def publish(self) -> None:
        """Write the manifest, and take the place of `out`.

        Raises:
            InputError: since the beginning `out` came to hold something else.
        """
        files = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        manifest = {"format": FORMAT, "files": [*files, MANIFEST]}
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=0) + "\n", encoding="ascii")
        check_out(self.out)
        old = None
        if self.out.exists():
            old = self.folder.with_name(f"{self.folder.name}.old")
            self.out.rename(old)
        self.folder.rename(self.out)
        if old is not None:
            shutil.rmtree(old)

    def discard(self) -> None:
        """Remove what was written, if it was not published."""
        shutil.rmtree(self.folder, ignore_errors=True)
