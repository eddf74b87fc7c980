"""Run as a script, for the tests of interrupted runs: children are forked after the imports, so they start at once.

`kill SRC OUT COUNT SEED` caches SRC into OUT in a child, kills it at a random moment, and so on until one ends by
itself. Prints how far the cache was (committed tasks) when each died.
`kill-update` does the same by `--update`; meanwhile and after each death the cache in OUT is read, all of it.
`share SRC OUT COUNT KILLS SEED` caches SRC into OUT in COUNT children at once, kills some of them, and prints how much
each has read and their exit codes. `share-update` does the same by `--update`.
Both have forms `-views`, of several views, whose tasks are counted together, and `-dedupe`, as in `kill-views-update`.
`kill-update-compact` copies the rows of hardly needed files instead.
`signal SRC MODEL OUT NUMBER [OUT NUMBER ...]` runs the command in a child for each OUT, sends it a signal after its
first task, and prints the exit codes.

When a child is struck is random, and that it is struck is certain: one that gets ahead of whoever is to strike it, as
on a fast or a busy machine, is held a task later until the blow comes.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from pathlib import Path

import torch
import typer
from models import random_model
from waiting import HANG_SECONDS, until

from capacitor_rt import FullCapacitor
from capacitor_rt.cache import CacheRequest, LatentDataset, RunOptions, cache_images, cache_views, parse_views, store
from capacitor_rt.cache.compaction import compact
from capacitor_rt.cache.encoder import BatchEncoder
from capacitor_rt.cache.plan import Task
from capacitor_rt.cache.report import Report
from capacitor_rt.cache.task_queue import TaskQueue
from capacitor_rt.cli.cache import cache
from capacitor_rt.cli.verify import verify
from capacitor_rt.extras import require_extra

REQUEST = CacheRequest(32, area=True, dtype="fp32", posterior=True, flip=True, task_inputs=3, batch=2)


VIEWS = parse_views(["32", "64@area+flip"], CacheRequest(32, dtype="fp32", task_inputs=3, batch=2))


def commits(out: Path) -> int:
    """Committed tasks of a cache, or of all views in a folder."""
    # no other folder is looked into: that of the leases comes and goes
    logs = [log for folder in (out, *(out / name for name in VIEWS)) for log in folder.glob("commits*.jsonl")]
    return sum(log.read_bytes().count(b"\n") for log in logs)


def wait_for_commits(out: Path, count: int, child: int, seconds: float = HANG_SECONDS) -> None:
    """Until so many tasks are committed, the child that commits them has ended, or `seconds` have passed."""
    deadline = time.monotonic() + seconds
    # the child stays a zombie, so that its id is its own, and whoever waits for it finds how it ended
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while commits(out) < count and time.monotonic() < deadline and not os.waitid(os.P_PID, child, look):
        time.sleep(0.0005)


def hold_commits(count: int) -> None:
    """In a child: it commits so many tasks, and then stands still until it is killed."""
    append, done = store.append_commit, []

    def held(*args) -> None:
        if len(done) == count:
            time.sleep(HANG_SECONDS)
        done.append(append(*args))

    store.append_commit = held


def hold_writes(count: int) -> None:
    """In a child: it writes so many tasks, and then stands still until it is killed: with a task, without the lock."""
    write, done = store.TaskStore.write, []

    def held(self, *args) -> None:
        if len(done) == count:
            time.sleep(HANG_SECONDS)
        done.append(write(self, *args))

    store.TaskStore.write = held


def meet(working: MutableSequence[int], rank: int) -> None:
    """In one of several children: it goes on from its first task when each has one."""
    take = TaskQueue.take

    def taken(self, task: Task) -> bool:
        is_taken = take(self, task)
        if is_taken:
            working[rank] = 1
            until(lambda: all(working[:]))
        return is_taken

    TaskQueue.take = taken


def hold_encoder(count: int) -> None:
    """In a child: its encoder takes so many batches, and then stands still until it is interrupted."""
    submit, done = BatchEncoder.submit, []

    def held(self, *args):
        if len(done) == count:
            time.sleep(HANG_SECONDS)
        done.append(None)
        return submit(self, *args)

    BatchEncoder.submit = held


def in_child(function) -> int:
    """Fork, call `function` in the child and end it with what that returns; the child's process id."""
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, which torch has and no child goes on with
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = function()
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def killed_on_failure(*children: int) -> Iterator[None]:
    """A child that stands still would be waited for long after this process has failed."""
    try:
        yield
    except BaseException:
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise


def cache_all(src: Path, out: Path, model: FullCapacitor, how: frozenset[str], **more: float) -> Report:
    """A run in this process."""
    options = RunOptions(workers=0, progress=False, update="update" in how, **more)
    if "views" in how:
        return cache_views(src, out, model, VIEWS, note=str, options=options)
    return cache_images(src, out, model, REQUEST, options=options)


def cache_at_leisure(src: Path, out: Path, model: FullCapacitor, how: frozenset[str], most: int | None) -> int:
    """Exit code of a run that leaves the processor to whoever is to strike it, and stands still after `most` tasks."""
    os.nice(10)
    if most is not None:
        hold_commits(most)
    if "compact" in how:
        compact(out)
        return 3
    # a lease whose taker was killed before it wrote its name is waited for; no other process is at work
    return cache_all(src, out, model, how, stale=1.0, heartbeat=0.2).exit_code


Rows = tuple[int, dict[str, bytes]]


def rows_of(out: Path) -> Rows:
    """Number of the generation and the bytes of every row, each compared with its hash."""
    ds = LatentDataset(out, verify=True)
    rows = {id: b"".join(t.numpy().tobytes() for t in ds.tensors(i).values()) for i, id in enumerate(ds.ids)}
    return ds.plan.number, rows


def kill_until_done(src: Path, out: Path, kills: int, seed: int, how: frozenset[str]) -> list[int]:
    model = random_model()
    rng = random.Random(seed)
    died: list[int] = []
    folders = [out / name for name in VIEWS] if "views" in how else [out]
    old = [(folder, rows_of(folder)) for folder in folders] if "update" in how else []
    while True:
        # let it finish between none and three more tasks (of few one), then strike within the next one
        before, more = commits(out), rng.randint(0, 1 if "compact" in how else 3)
        most = more + 1 if len(died) < kills else None
        child = in_child(lambda most=most: cache_at_leisure(src, out, model, how, most))
        with killed_on_failure(child):
            if most is not None:
                wait_for_commits(out, before + more, child)
                time.sleep(rng.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
            else:
                check_readable(old)
        _, status = os.waitpid(child, 0)
        check_readable(old)
        if os.WIFSIGNALED(status):
            died.append(commits(out))
            continue
        assert os.WEXITSTATUS(status) == 3, f"the run ended with {os.WEXITSTATUS(status)}"
        return died


def check_readable(old: list[tuple[Path, Rows]]) -> None:
    """The caches are whole: each as it was, or updated."""
    for folder, before in old:
        now = rows_of(folder)
        assert now == before or now[0] > before[0]


def share(src: Path, out: Path, count: int, kills: int, seed: int, how: frozenset[str]) -> list[int]:
    """Exit codes of `count` processes that cache at once, of which `kills` are killed at random moments.

    None commits anything before each has a task, however fast one is.
    """
    model = random_model()
    rng = random.Random(seed)
    working = mmap.mmap(-1, count)
    # those that are to be killed stand still, with a task, before they have done all that there is
    most = {rank: rng.randint(0, 2) for rank in rng.sample(range(count), kills)}

    def run(rank: int) -> int:
        meet(working, rank)
        if rank in most:
            hold_writes(most[rank])
        try:
            return cache_at_rank(src, out, model, rank, count, how)
        finally:
            # nobody waits for one that failed
            working[rank] = 1

    children = [in_child(lambda rank=rank: run(rank)) for rank in range(count)]
    with killed_on_failure(*children):
        for rank in most:
            # the others wait for its task in the end, and then commit no more
            wait_for_commits(out, commits(out) + rng.randint(1, 3), children[rank], seconds=2)
            time.sleep(rng.uniform(0, 0.03))
            os.kill(children[rank], signal.SIGKILL)
            working[rank] = 1
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def cache_at_rank(src: Path, out: Path, model: FullCapacitor, rank: int, count: int, how: frozenset[str]) -> int:
    """Exit code of one of several runs; prints how many inputs it has read."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    report = cache_all(src, out, model, how)
    print(f"read {report.new_images}", flush=True)
    return report.exit_code


def command(*args: str) -> int:
    """Exit code of `capacitor-rt ARGS`, the cache's commands."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(cache)
    app.command()(verify)
    try:
        app(args)
    except SystemExit as e:
        return e.code
    return 0


def signal_command(src: Path, out: Path, model: Path, number: int) -> int:
    sizes = ("--size", "32", "--task-inputs", "2", "--workers", "1", "--device", "cpu")

    def run() -> int:
        # of two images at most: these are of twelve tasks
        hold_encoder(12)
        return command("cache", str(src), str(out), "--model", str(model), *sizes)

    child = in_child(run)
    with killed_on_failure(child):
        wait_for_commits(out, 1, child)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in ("pyarrow.parquet", "xxhash"):
        require_extra(module)
    mode, src, second, *rest = sys.argv[1:]
    mode, *words = mode.split("-")
    how = frozenset(words)
    if "dedupe" in how:
        REQUEST = dataclasses.replace(REQUEST, dedupe=True)
        VIEWS = {name: dataclasses.replace(request, dedupe=True) for name, request in VIEWS.items()}
    if mode == "kill":
        print(*kill_until_done(Path(src), Path(second), *map(int, rest), how))
    elif mode == "share":
        print("codes", *share(Path(src), Path(second), *map(int, rest), how))
    else:
        outs, numbers = map(Path, rest[::2]), map(int, rest[1::2])
        print(*(signal_command(Path(src), out, Path(second), n) for out, n in zip(outs, numbers, strict=True)))
