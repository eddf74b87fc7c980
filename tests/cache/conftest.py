"""Fixtures of the cache tests."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest

NOBODY = 65534


@pytest.fixture
def as_nobody():
    """A context in which file permissions count, also where the tests are run by root."""

    @contextmanager
    def context(folder):
        if os.geteuid() != 0:
            yield
            return
        owned = (p for p in (folder, *folder.parents) if p.stat().st_mode & 0o011 != 0o011 or p == folder)
        for parent in owned:
            # the group's bits too: the group stays root's
            parent.chmod(parent.stat().st_mode | (0o055 if parent == folder else 0o011))
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)

    return context
