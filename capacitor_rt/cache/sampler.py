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

    With `run` above 1 not rows are shuffled but runs of so many neighbours, which a file is read at for once: a batch
    of 64 in runs of 8 costs 8 reads instead of 64, on disks and networks where that counts. The runs begin elsewhere
    in every epoch. Neighbours are alike where the source is sorted, for instance by class, so keep runs short beside a
    batch.

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
        run: int = 1,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size} is too small: it is at least 1")
        if run < 1 or batch_size % run:
            raise InputError(f"run {run} does not divide batch_size {batch_size}: a batch is of whole runs")
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} is not among 0 to {world_size - 1}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.run = run
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
        orders = [self._in_runs(rows, n) for n, rows in enumerate(self._members())]
        mine = (s for s in self._shuffled(self._steps(), len(orders)) if self._share(s[2] - s[1]))
        for number, (bucket, begin, end) in enumerate(mine):
            if number < start:
                continue
            self._given = number + 1
            yield orders[bucket][begin:end][self._mine(end - begin)].tolist()

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Where this epoch is. `done`: batches of this epoch that are finished; default all that were given out."""
        return self._settings() | {"epoch": self.epoch, "done": self._given if done is None else done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved state was.

        Raises:
            InputError: the state is of another cache or of other settings, under which the order is another.
        """
        # a state of before there were runs
        state = {"run": 1} | state
        differing = {k: (state.get(k), v) for k, v in self._settings().items() if state.get(k) != v}
        if differing:
            changes = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in differing.items())
            raise InputError(f"the sampler's state does not fit ({changes}): resume with the same cache and settings")
        self.epoch, self._start = state["epoch"], state["done"]
        self._given = self._start

    def _settings(self) -> dict[str, Any]:
        names = ("batch_size", "shuffle", "seed", "drop_last", "world_size", "run")
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
        """How many of a step's rows are this rank's."""
        return self.batch_size if rows == self.batch_size * self.world_size else len(self._mine(rows))

    def _mine(self, rows: int) -> np.ndarray:
        """Which of a step's rows are this rank's: every so manieth run, of a smaller step every so manieth row."""
        run = self.run if rows == self.batch_size * self.world_size else 1
        return np.flatnonzero(np.arange(rows) // run % self.world_size == self.rank)

    def _in_runs(self, rows: np.ndarray, stream: int) -> np.ndarray:
        """The rows of a bucket, runs of neighbours in a shuffled order; those at the ends are shorter."""
        if not self.shuffle or self.run == 1:
            return self._shuffled(rows, stream)
        random = self._random(stream)
        first = int(random.integers(min(self.run, len(rows) + 1)))
        stop = len(rows) - (len(rows) - first) % self.run
        whole = random.permutation(rows[first:stop].reshape(-1, self.run), axis=0)
        # those at the ends behind the others, so that no other is cut by the end of a batch
        return np.concatenate([whole.reshape(-1), rows[:first], rows[stop:]])

    def _shuffled(self, values: np.ndarray, stream: int) -> np.ndarray:
        return self._random(stream).permutation(values, axis=0) if self.shuffle else values

    def _random(self, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, self.epoch, stream])))
