"""What is made once for all processes of a test run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


def once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make(folder)` filled, in whichever process came first; the others wait for it.

    What it raises, it raises in each process that asks.
    """
    root = tmp_path_factory.getbasetemp()
    # processes of pytest-xdist have a folder each, in one of the run
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder
