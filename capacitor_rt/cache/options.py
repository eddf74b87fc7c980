"""How a run works: what a caller may choose without changing a byte of the latents."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from .decoding import BACKOFF_SECONDS
from .leases import HEARTBEAT_SECONDS, STALE_SECONDS
from .sources import ColumnsRequest


@dataclass(frozen=True)
class RunOptions:
    """How a run works, and where the inputs are and what is kept beside them.

    Attributes:
        workers: processes for reading and decoding; None: one per core, less one that drives a GPU. Where there is
            little to do fewer are started, one at least; 0: the run decodes itself, at the mercy of its decoders.
        image_timeout: seconds that reading and decoding one image may take, where there are workers.
        pixel_budget: bytes that all workers together may take for images: an eighth for files that they have read, the
            rest to decode them. Where they are resized on the GPU half of it holds decoded ones first.
        resize: where images are resized, "cpu", "gpu" or "auto", which is the CPU; the bits are the same.
        metrics: a file for `Meters.report`, kept up to date: JSON, or Prometheus text if its name ends in `.prom`.
        progress: show a bar on stderr.
        give_up: finish tasks in spite of inputs that failed for now (I/O errors and the like): they are quarantined.
        retry_quarantined: try quarantined inputs again, and redo the tasks of those that can be decoded now.
        update: if the inputs are no longer those of the cache, make a new generation of it, which keeps every row whose
            input has the same bytes.
        rehash: with `update`, read every input: trust no unchanged size and time of a file.
        rank, world_size: of several processes that write one cache; they only choose where each one begins. None: the
            environment's RANK and WORLD_SIZE, or those of a Slurm array or of `srun`.
        backoff: seconds to wait before each further attempt at an input that failed for now.
        heartbeat, stale: seconds between touches of a lease, and after which an untouched one is taken over.
        source: what kind of source the inputs are, one of `sources.open.KINDS`.
        image_column: of Parquet files; None: the one that is named so, or has the type.
        columns: labels, captions and other columns to be kept.
        measure: images on which a run that makes a new plan measures what each storage type costs; None: 4 where
            latents are stored in int8, otherwise none.
    """

    workers: int | None = None
    image_timeout: float = 60.0
    pixel_budget: int = 2 << 30
    resize: str = "auto"
    metrics: str | os.PathLike[str] | None = None
    progress: bool = True
    give_up: bool = False
    retry_quarantined: bool = False
    update: bool = False
    rehash: bool = False
    rank: int | None = None
    world_size: int | None = None
    backoff: tuple[float, ...] = BACKOFF_SECONDS
    heartbeat: float = HEARTBEAT_SECONDS
    stale: float = STALE_SECONDS
    source: str = "auto"
    image_column: str | None = None
    columns: ColumnsRequest = field(default_factory=ColumnsRequest)
    measure: int | None = None

    def place(self) -> tuple[int, int]:
        """Rank and world size."""
        rank, size = _place(os.environ)
        rank = rank if self.rank is None else self.rank
        size = max(size if self.world_size is None else self.world_size, 1)
        return rank % size, size


def _place(env: Mapping[str, str]) -> tuple[int, int]:
    """Rank and world size by the variables of torchrun, of a Slurm array, or of `srun`, whichever are there."""
    for rank, size, first in (
        ("RANK", "WORLD_SIZE", ""),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ("SLURM_PROCID", "SLURM_NTASKS", ""),
    ):
        if rank in env and size in env:
            try:
                return int(env[rank]) - int(env.get(first, 0)), int(env[size])
            except ValueError:
                return 0, 1
    return 0, 1
