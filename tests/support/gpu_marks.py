"""Which of the collected test files have tests that need a GPU."""

from __future__ import annotations

import pytest

FILES: pytest.StashKey[set[str]] = pytest.StashKey()


def has(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None
