"""What the stages of a run did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Meters:
    """Seconds of work per stage. Read and decode add up over their workers; the others have one worker each."""

    threads: int
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "decode", "encode", "write"), 0.0))
    wall: float = 0.0

    def occupancy(self) -> dict[str, float]:
        """Share of its workers' time that each stage has worked, 0 to 1."""
        wall = max(self.wall, 1e-9)
        return {k: s / wall / (self.threads if k in ("read", "decode") else 1) for k, s in self.seconds.items()}

    def limit(self) -> str:
        """The stage that is busiest; of read and decode, which share their workers, the larger part of the two."""
        busy = self.occupancy()
        pool = max(("read", "decode"), key=busy.__getitem__)
        shares = {pool: busy["read"] + busy["decode"], "encode": busy["encode"], "write": busy["write"]}
        return max(shares, key=shares.__getitem__)

    def __str__(self) -> str:
        share = {k: f"{k} {v:.0%}" for k, v in self.occupancy().items()}
        share["decode"] += f" of {self.threads} threads"
        return f"{', '.join(share.values())}; limited by {self.limit()}"
