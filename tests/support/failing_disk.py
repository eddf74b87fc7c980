"""A disk that fails: system calls on files below a folder raise what a full, broken or read-only one does."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

WRITING = ("write", "pwrite", "ftruncate", "fsync", "link", "rename", "open", "mkdir", "utime", "unlink", "rmdir")
"""Calls that change a disk; of `open` those that create or write."""


class FailingDisk:
    """Replaces functions of `os` by ones that fail on the files of `root` that are chosen.

    Attributes:
        calls: what failed: name of the call, and the path relative to `root`.

    Args:
        monkeypatch: which undoes it.
        code: the error's number.
        fails: told the name of a call and the path relative to `root`, whether it is to fail.
    """

    def __init__(self, monkeypatch, root: Path, code: int, fails: Callable[[str, str], bool]):
        self.root, self.code, self.fails = os.path.realpath(root), code, fails
        self.calls: list[tuple[str, str]] = []
        for name in WRITING:
            monkeypatch.setattr(os, name, self._failing(name, getattr(os, name)))

    def _failing(self, name, real):
        def call(target, *args, **kwargs):
            changes = name != "open" or (args and args[0] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
            at = self._relative(target, args, kwargs) if changes else None
            if at is not None and self.fails(name, at):
                self.calls.append((name, at))
                if name == "write" and len(memoryview(args[0])) > 1:
                    # some of it is written first
                    real(target, memoryview(args[0])[: len(memoryview(args[0])) // 2])
                raise OSError(self.code, os.strerror(self.code))
            return real(target, *args, **kwargs)

        return call

    def _relative(self, target, args, kwargs) -> str | None:
        folder = kwargs.get("dir_fd", kwargs.get("src_dir_fd"))
        if isinstance(target, int):
            path = os.readlink(f"/proc/self/fd/{target}")
        elif folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(target))
        else:
            path = os.path.realpath(os.fsdecode(target))
        path = path.removesuffix(" (deleted)")
        return os.path.relpath(path, self.root) if path == self.root or path.startswith(self.root + "/") else None


def after(count: int, call: str, pattern: str) -> Callable[[str, str], bool]:
    """Whether a call on a path that the pattern matches as a whole has come more than `count` times before."""
    left = [count]

    def fails(name: str, path: str) -> bool:
        if name != call or not re.fullmatch(pattern, path):
            return False
        left[0] -= 1
        return left[0] < 0

    return fails
