"""`BucketBatchSampler`: batches of one size each, shared out to ranks, that can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ..errors import InputError
from .dataset import LatentDataset


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of row numbers of one bucket each, for `DataLoader(batch_sampler=...)`.

    A step takes `batch_size * world_size` rows of one bucket and gives each rank an equal share, so that ranks see
    the same size in the same step and no row twice. The last, smaller step of a bucket is shared out as evenly as it
    goes, and a rank that would get nothing skips it; with `drop_last` it is left out, and every rank has the same
    number of batches.

    The order is a function of (seed, epoch); call `set_epoch` before each epoch. `len` is the number of this rank's
    batches.

    To resume in the middle of an epoch, save `state_dict(done)` and give it to `load_state_dict` of a new sampler;
    iteration goes on after `done` batches. Data loader workers ask for batches ahead of time: pass the number that
    your loop has finished.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size} is too small: it is at least 1")
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} is not among 0 to {world_size - 1}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._start = 0
        self._given = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, from its beginning; the epoch of a loaded state keeps its place."""
        if epoch != self.epoch:
            self.epoch, self._start = epoch, 0
        self._given = self._start

    def __len__(self) -> int:
        return sum(self._share(stop - start) > 0 for _, start, stop in self._steps())

    def __iter__(self) -> Iterator[list[int]]:
        start, self._start = self._start, 0
        self._given = start
        orders = [self._shuffled(rows, n) for n, rows in enumerate(self._members())]
        mine = (s for s in self._shuffled(self._steps(), len(orders)) if self._share(s[2] - s[1]))
        for number, (bucket, begin, end) in enumerate(mine):
            if number < start:
                continue
            self._given = number + 1
            yield orders[bucket][begin + self.rank : end : self.world_size].tolist()

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Where this epoch is. `done`: batches of this epoch that are finished; default all that were given out."""
        return self._settings() | {"epoch": self.epoch, "done": self._given if done is None else done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved state was.

        Raises:
            InputError: the state is of another cache or of other settings, under which the order is another.
        """
        differing = {k: (state.get(k), v) for k, v in self._settings().items() if state.get(k) != v}
        if differing:
            changes = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in differing.items())
            raise InputError(f"the sampler's state does not fit ({changes}): resume with the same cache and settings")
        self.epoch, self._start = state["epoch"], state["done"]
        self._given = self._start

    def _settings(self) -> dict[str, Any]:
        names = ("batch_size", "shuffle", "seed", "drop_last", "world_size")
        own = {name: getattr(self, name) for name in names}
        return own | {"plan": self.dataset.plan.id, "rows": len(self.dataset)}

    def _members(self) -> list[np.ndarray]:
        """Rows of each bucket, ascending."""
        numbers = self.dataset.bucket_numbers
        by_bucket = np.argsort(numbers, kind="stable")
        return np.split(by_bucket, np.cumsum(np.bincount(numbers, minlength=len(self.dataset.buckets)))[:-1])

    def _steps(self) -> np.ndarray:
        """(bucket, begin, end) of every step of all ranks in the buckets' shuffled rows, int64 `[S,3]`."""
        step = self.batch_size * self.world_size
        steps = []
        for bucket, count in enumerate(np.bincount(self.dataset.bucket_numbers).tolist()):
            begins = np.arange(0, count - step + 1 if self.drop_last else count, step)
            steps.append(np.stack([np.full_like(begins, bucket), begins, np.minimum(begins + step, count)], 1))
        return np.concatenate(steps)

    def _share(self, rows: int) -> int:
        """Rows of a step of `rows` rows that are this rank's."""
        return len(range(self.rank, rows, self.world_size))

    def _shuffled(self, values: np.ndarray, stream: int) -> np.ndarray:
        if not self.shuffle:
            return values
        seed = np.random.SeedSequence([self.seed, self.epoch, stream])
        return np.random.Generator(np.random.PCG64(seed)).permutation(values, axis=0)
