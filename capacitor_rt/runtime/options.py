"""How a model is served, as its owner asked."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError


@dataclass
class ServingOptions:
    """Settings of the Triton backend; the runtime looks at them at every call.

    Attributes:
        low_latency: run a single image by launches shaped for it.
        cuda_graphs: capture and replay CUDA graphs; else every launch is queued by itself.
        overlap: run the halves of an even batch as two branches of one graph.
        narrow_tiles: run few images by narrower tiles, where their bits stay those of many.
        dependent_launch: let each launch start while the one before is at its end (programmatic dependent launch).
        memory_budget: bytes of all arenas together, None for the default. What is about to run is kept all the same.

    Raises:
        InputError: a budget that is no positive number of bytes.
    """

    low_latency: bool = False
    cuda_graphs: bool = True
    overlap: bool = False
    memory_budget: int | None = None
    narrow_tiles: bool = True
    dependent_launch: bool = False

    def __post_init__(self) -> None:
        budget = self.memory_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
            raise InputError(
                f"memory_budget {budget!r} is no positive number of bytes: leave it out, or give e.g. 2**30"
            )
