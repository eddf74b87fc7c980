"""Command line of the mutants: what each finding is and how to have it again, a line of counts per surface.

Exit code 1 for a finding.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch

from .caches import Caches
from .checkpoints import Checkpoints
from .documents import Documents
from .forked import BATCH, REFUSED, TAKEN, Corpus, Surface, judge
from .images import Images
from .sources import Sources

SURFACES: dict[str, type[Surface]] = {
    "checkpoints": Checkpoints,
    "caches": Caches,
    "images": Images,
    "sources": Sources,
    "documents": Documents,
}


def campaign(surface: Surface, seed: int, first: int, mutants: int | None, minutes: float) -> int:
    """Judge mutants until there are `mutants` of them or the time is over; the number of findings."""
    surface.warm()
    start = time.monotonic()
    counts: Counter[str] = Counter()
    slowest, largest, number = 0.0, 0, first
    stop = None if mutants is None else first + mutants
    while (stop is None or number < stop) and time.monotonic() - start < 60 * minutes:
        numbers = range(number, number + BATCH if stop is None else min(stop, number + BATCH))
        for verdict in judge(surface, seed, numbers):
            counts[verdict.outcome if not verdict.is_finding else "findings"] += 1
            if verdict.is_finding:
                again = f"--surface {surface.name} --seed {seed} --first {verdict.number} --mutants 1"
                print(
                    f"{surface.name} {seed}:{verdict.number} {verdict.what}: {verdict.outcome}\n"
                    f"  again: python -m tests.fuzz {again}",
                    flush=True,
                )
            elif verdict.outcome == REFUSED:
                slowest, largest = max(slowest, verdict.seconds), max(largest, verdict.peak)
        number = numbers.stop
    print(
        f"{surface.name}: seed {seed}, {number - first} mutants in {time.monotonic() - start:.0f} s: "
        f"{counts[TAKEN]} taken, {counts[REFUSED]} refused (at most {slowest:.2f} s and {largest >> 20} MiB), "
        f"{counts['findings']} findings",
        flush=True,
    )
    return counts["findings"]


def replay(surface: Surface) -> int:
    """Judge what once was a finding; the number of those that are one again."""
    surface.warm()
    cases = Corpus(surface)
    found = 0
    for verdict in judge(cases, 0, range(len(cases.cases))):
        wanted = TAKEN if verdict.what.startswith(TAKEN) else REFUSED
        if verdict.outcome != wanted:
            found += 1
            print(f"{surface.name} {verdict.what}: {verdict.outcome}, not {wanted}", flush=True)
    print(f"{surface.name}: {len(cases.cases)} of the corpus, {found} findings", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="Time per surface.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the mutants.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first mutant.")
    parser.add_argument("--mutants", type=int, help="Stop after this many mutants per surface.")
    parser.add_argument("--surface", choices=SURFACES, action="append", help="Surfaces to run; default all.")
    parser.add_argument("--replay", action="store_true", help="Judge the corpus of former findings instead.")
    args = parser.parse_args()
    # forks and threads do not mix
    torch.set_num_threads(1)
    names = args.surface or list(SURFACES)
    if args.replay:
        return 1 if sum(replay(SURFACES[n]()) for n in names) else 0
    found = sum(campaign(SURFACES[n](), args.seed, args.first, args.mutants, args.minutes) for n in names)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
