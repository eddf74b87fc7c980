"""The interpreter pays for every operation of every program: fewer, taller ones. Their bits are the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _tall_tiles():
    if torch.cuda.is_available():
        yield
        return
    from capacitor_kernels import tuning

    lookup = tuning.lookup

    def tall(family, *args):
        config = lookup(family, *args)
        return dataclasses.replace(config, strips_y=16, num_warps=8) if family == "dwconv" else config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "lookup", tall)
        yield
