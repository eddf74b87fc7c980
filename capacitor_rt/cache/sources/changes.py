"""Whether the inputs that are found now are those that a cache was planned for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ...errors import ImageError
from ...images.scan import path_to_id
from ..hashing import xxh3
from . import Expecting, Reader, Source
from .listing import Listing, examples

THREADS, BLOCK = 8, 512


def changed_inputs(
    planned: Listing,
    source: Source,
    known_hashes: Callable[[list[int]], dict[int, bytes]],
    *,
    rehash: bool = False,
) -> list[str]:
    """What differs between the planned inputs and those found now, one line per kind; empty if nothing does.

    A file whose time alone differs is read again, if its bytes are known.

    Args:
        known_hashes: XXH3-128 of those of the given inputs that have been read before, by ordinal.
        rehash: read the others too.
    """
    now = source.listing
    if planned.locators == now.locators:
        resized = np.flatnonzero((planned.sizes != now.sizes) | (planned.offsets != now.offsets)).tolist()
        touched = np.flatnonzero((rehash | (planned.mtimes != now.mtimes)) & (planned.sizes == now.sizes)).tolist()
        edited = _edited(source, known_hashes(touched)) if touched else []
        return examples("changed", [planned.id(i) for i in sorted(resized + edited)])
    before = dict(zip(planned.locators, planned.sizes.tolist(), strict=True))
    after = dict(zip(now.locators, now.sizes.tolist(), strict=True))
    found = {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": sorted(p for p in before.keys() & after.keys() if before[p] != after[p]),
    }
    lines = [line for kind, names in found.items() for line in examples(kind, [path_to_id(n) for n in names])]
    return lines or ["the same inputs in another order"]


def _edited(source: Source, known: dict[int, bytes]) -> list[int]:
    """Inputs whose bytes have not the hash that is known of them."""
    reader, ordinals, edited = source.open(), sorted(known), []
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(ordinals), BLOCK):
            block = ordinals[start : start + BLOCK]
            if isinstance(reader, Expecting):
                reader.expect(block)
            has = pool.map(lambda i: _has_bytes(reader, i, known[i]), block)
            edited += [i for i, same in zip(block, has, strict=True) if not same]
    return edited


def _has_bytes(reader: Reader, i: int, digest: bytes) -> bool:
    try:
        return xxh3(reader.read(i)).digest() == digest
    except ImageError:
        return False
