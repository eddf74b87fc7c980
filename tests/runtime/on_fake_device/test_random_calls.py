"""Random sequences of calls, edits, moves, captures and failures, on every architecture."""

from __future__ import annotations

import os

import random_calls

SEQUENCES = int(os.environ.get("CAPACITOR_RANDOM_SEQUENCES", "60"))


def test_random_sequences_succeed_or_raise_our_errors():
    assert random_calls.run(SEQUENCES, seed=0)
