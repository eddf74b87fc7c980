"""The mutants of a finished cache: which mutators there are, and how they are drawn and applied."""

from __future__ import annotations

import random
from pathlib import Path

from .cache_forgeries import FORGERIES
from .cache_forgeries import WEIGHTS as FORGERY_WEIGHTS
from .cache_mutators import MUTATORS, WEIGHTS, NothingToDo
from .cache_plans import AGREEING, PLANS
from .cache_plans import WEIGHTS as PLAN_WEIGHTS

ALL = MUTATORS | FORGERIES | PLANS


def draw(rng: random.Random, seed: str) -> list[list[str]]:
    """Names and seeds of the mutators of one mutant: one, or sometimes a few."""
    names = list(ALL)
    if rng.random() < 0.93:
        return [[*rng.choices(names, WEIGHTS + FORGERY_WEIGHTS + PLAN_WEIGHTS), seed]]
    names.remove("linked")
    return [[rng.choice(names), f"{seed}:{k}"] for k in range(rng.choice((2, 3)))]


def may_differ(steps: list[list[str]]) -> bool:
    """Whether a mutant may say something else than what was cached, in every file alike, and no one can know."""
    return any(name in AGREEING for name, *_ in steps)


def mutate(cache: Path, steps: list[list[str]]) -> str:
    """Apply mutators by name and seed; what they did, in words."""
    done = []
    for name, seed in steps:
        try:
            done.append(ALL[name](cache, random.Random(seed)))
        except NothingToDo:
            continue
        except Exception:
            # the ones before may have left no such part, or nonsense in its place
            if not done:
                raise
    return "; ".join(done)
