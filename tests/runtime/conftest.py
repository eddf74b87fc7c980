"""The interpreter pays for every operation of every program: fewer, taller ones. Their bits are the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _tall_tiles(monkeypatch):
    if torch.cuda.is_available():
        return
    from capacitor_kernels import tuning

    lookup = tuning.lookup

    def tall(family: str, *args: Any, **options: Any) -> Any:
        config = lookup(family, *args, **options)
        return dataclasses.replace(config, strips_y=16, num_warps=8) if family == "dwconv" else config

    monkeypatch.setattr(tuning, "lookup", tall)
