"""What the static cost model believes of each GPU, and how cycles by pipe become the time of a grid."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# how much of prologue and epilogue hides under another CTA's main loop: 0 none, 1 all
HIDING = 0.5
# seconds between two launches of which the second starts early and waits: its CTAs are there already, and the first
# one's writes have to be made visible. A guess
EARLY_GAP = 0.5e-6
# cycles to launch a CTA and load its constants
CTA_START = 350


@dataclass(frozen=True)
class Gpu:
    """A GPU under load.

    Attributes:
        ghz: clock of the SMs.
        tflops: what a whole-GPU bf16 product reaches at best, by power or by specification.
        dram: bytes per second of a copy.
        l2: bytes per second from L2 to all SMs.
        l2_bytes: capacity in which activations may stay from one launch to the next.
        port: bytes per clock from L2 to one SM.
        latency: cycles of a load that misses L1, L2 and DRAM mixed.
        gap: seconds between two dependent launches of a graph.
        efficiency: share of the tensor pipe's cycles that the best main loops reach.
        fp8: what a product in e4m3 reaches over one in bf16, 0 without such instructions.
    """

    name: str
    cc: int
    sms: int
    ghz: float
    tflops: float
    dram: float
    l2: float
    l2_bytes: float
    port: int
    latency: int
    gap: float
    efficiency: float
    fp8: float = 0


# 790 TFLOP/s and 4.3 TB/s of the H200 are measured (docs/numbers.md); rates of L2, latencies and gaps are guesses.
# e4m3: twice bf16 by the datasheets of sm_90; four times by the block-scaled instruction of sm_120, 1005 TFLOP/s
# measured there by others against 255 (shared with the project as quack's notes on the RTX 5090)
GPUS = {
    "h200": Gpu("H200", 90, 132, 1.70, 790, 4.3e12, 11e12, 30e6, 64, 700, 1.3e-6, 0.95, 2),
    "h100": Gpu("H100 SXM", 90, 132, 1.70, 750, 3.0e12, 11e12, 30e6, 64, 700, 1.3e-6, 0.95, 2),
    "5090": Gpu("RTX 5090", 120, 170, 2.407, 209.5, 1.53e12, 7e12, 60e6, 64, 800, 1.3e-6, 0.97, 4),
    "a100": Gpu("A100 80G", 80, 108, 1.41, 265, 1.75e12, 4.5e12, 24e6, 64, 600, 1.5e-6, 0.95),
}


@dataclass
class Cta:
    """One CTA.

    Attributes:
        pipes: region -> pipe -> cycles that the CTA keeps it busy, per SM.
        latency: region -> cycles that nothing in the CTA hides.
        floor: cycles that the main loop takes whatever the pipes, by its loads in flight.
    """

    pipes: dict[str, dict[str, float]] = field(default_factory=dict)
    latency: dict[str, float] = field(default_factory=dict)
    floor: float = 0.0

    def totals(self) -> Counter[str]:
        """Cycles by pipe over all regions."""
        return sum((Counter(pipes) for pipes in self.pipes.values()), Counter())

    def cycles(self, together: int, hiding: float = HIDING) -> float:
        """Cycles until so many CTAs that start together on one SM are done.

        They lie between in phase, where regions add up, and ideal, where the busiest pipe over everything counts.
        """
        if together == 0:
            return 0.0
        alone = {region: self._region(region, 1) + self.latency[region] for region in self.pipes}
        in_phase = CTA_START + sum(max(self._region(region, together), alone[region]) for region in self.pipes)
        busiest = together * max(self.totals().values(), default=0.0)
        ideal = max(busiest, self.alone())
        share = hiding if together > 1 else 0.0
        return share * ideal + (1 - share) * in_phase

    def alone(self) -> float:
        """Cycles of one CTA that has an SM for itself."""
        return CTA_START + sum(self._region(region, 1) + self.latency[region] for region in self.pipes)

    def _region(self, region: str, together: int) -> float:
        busiest = together * max(self.pipes[region].values(), default=0.0)
        return max(busiest, self.floor) if region == "main" else busiest


def schedule(cta: Cta, grid: int, per_sm: int, sms: int, hiding: float = HIDING) -> tuple[float, float]:
    """(cycles, waves) of a grid: whole waves, and a tail that spreads over the SMs."""
    slots = per_sm * sms
    full, rest = divmod(grid, slots)
    tail = -(-rest // sms)
    return full * cta.cycles(per_sm, hiding) + cta.cycles(min(tail, per_sm), hiding), grid / slots
