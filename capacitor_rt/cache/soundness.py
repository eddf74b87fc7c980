"""Whether files of latents are what is said of them: header, hash, and each row against the hash that an index has.

A file's header names the index that it was written with, and its hash is in the commit line: so a file that this
machine has compared with its index, or written, vouches for that index as long as it is the same file (`stamps`), and
no row need be read again. Any other file is read once, and its rows are hashed as they come by.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict

import numpy as np

from ..errors import CacheError
from .carried import CarriedFile
from .folder import CacheFolder
from .latent_files import file_hashes, has_header, index_hash_in_header, numbers_problem
from .plan import CachePlan
from .stamps import Stamps

FILES = 1024
"""Whose rows' hashes are kept at hand: 128 MiB of the default size of a task."""


class Soundness:
    """What was found of the files of latents of a folder. Several threads may use one instance.

    Args:
        stamps: of files that need not be read again; None: every file is read.
    """

    def __init__(self, folder: CacheFolder, stamps: Stamps | None = None):
        self.folder = folder
        self.stamps = stamps
        self._problems: dict[CarriedFile, str | None] = {}
        self._rows: OrderedDict[CarriedFile, dict[int, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()
        # of each file, so that none is read twice at once
        self._locks: defaultdict[CarriedFile, threading.Lock] = defaultdict(threading.Lock)

    def is_known(self, file: CarriedFile) -> bool:
        """Whether it is one that this machine has compared with its index, or written."""
        return self.stamps is not None and self.stamps.vouch(file.name, file.data_xxh3)

    def note(self, file: CarriedFile) -> None:
        """Take note that a file was found sound."""
        if self.stamps is not None:
            self.stamps.add(file.name, file.data_xxh3)

    def problem(self, file: CarriedFile, plan: CachePlan) -> str | None:
        """What is wrong with a file, None if it is sound. It is looked at once."""
        with self._lock_of(file):
            if file not in self._problems:
                self._problems[file] = self._problem(file, plan)
            return self._problems[file]

    def disowns(self, file: CarriedFile) -> bool:
        """Whether a file names another index than the one that is said to be its own."""
        try:
            with self.folder.open(file.name) as opened:
                return index_hash_in_header(opened.fileno()) not in (None, file.index_xxh3)
        except (FileNotFoundError, CacheError):
            return False

    def differing(
        self, file: CarriedFile, plan: CachePlan, bucket: np.ndarray, row: np.ndarray, hashes: np.ndarray
    ) -> np.ndarray:
        """Which rows of a sound file have other hashes than these, uint64 `[n,2]`; bool `[n]`.

        Raises:
            FileNotFoundError; CacheError: it is damaged meanwhile.
        """
        with self._lock_of(file):
            known = self._hashes(file, plan)
        differ = np.ones(len(row), bool)
        for number, rows in known.items():
            at = np.flatnonzero(bucket == number)
            differ[at] = (rows[row[at]] != hashes[at]).any(1)
        return differ

    def _lock_of(self, file: CarriedFile) -> threading.Lock:
        with self._lock:
            return self._locks[file]

    def _problem(self, file: CarriedFile, plan: CachePlan) -> str | None:
        path, placed = self.folder.path / file.name, file.layout(plan)
        try:
            with self.folder.open(file.name) as opened:
                if not has_header(opened.fileno(), placed):
                    return f"{path} is damaged: its header or its size is not that of its index"
            if self.is_known(file):
                return None
            hashes = file_hashes(self.folder, file.name, placed)
            if hashes.file != file.data_xxh3:
                return f"{path} is damaged: its hash is not that of its commit line"
            if not hashes.is_padded:
                return f"{path} is damaged: what lies between its tensors is not zero"
            if why := numbers_problem(self.folder, file.name, plan, placed):
                return f"{path} is damaged: {why}"
        except FileNotFoundError:
            return f"{path} is missing"
        except CacheError as e:
            return str(e)
        self._keep(file, hashes.rows)
        return None

    def _hashes(self, file: CarriedFile, plan: CachePlan) -> dict[int, np.ndarray]:
        with self._lock:
            if file in self._rows:
                self._rows.move_to_end(file)
                return self._rows[file]
        hashes = file_hashes(self.folder, file.name, file.layout(plan))
        self._keep(file, hashes.rows)
        return hashes.rows

    def _keep(self, file: CarriedFile, rows: dict[int, np.ndarray]) -> None:
        with self._lock:
            self._rows[file] = rows
            while len(self._rows) > FILES:
                self._rows.popitem(last=False)
