"""Hashes and canonical bytes: what two machines must agree on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ..extras import require_extra

if TYPE_CHECKING:
    from torch import Tensor
    from xxhash import xxh3_128


def xxh3(data: bytes | memoryview = b"") -> xxh3_128:
    """A streaming XXH3 hash of 128 bits that has taken in `data`."""
    return require_extra("xxhash").xxh3_128(data)


def byte_view(t: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU, uint8 `[nbytes]`, without a copy."""
    import torch

    return t.flatten().view(torch.uint8).numpy()


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, ASCII only: equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
