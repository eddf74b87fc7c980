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
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import typer
from models import random_model

from capacitor_rt import FullCapacitor
from capacitor_rt.cache import CacheRequest, LatentDataset, RunOptions, cache_images, cache_views, parse_views
from capacitor_rt.cache.compaction import compact
from capacitor_rt.cache.report import Report
from capacitor_rt.cli.cache import cache
from capacitor_rt.cli.verify import verify
from capacitor_rt.extras import require_extra

REQUEST = CacheRequest(32, area=True, dtype="fp32", posterior=True, flip=True, task_inputs=3, batch=2)


VIEWS = parse_views(["32", "64@area+flip"], CacheRequest(32, dtype="fp32", task_inputs=3, batch=2))


def commits(out: Path) -> int:
    """Committed tasks of a cache, or of all views in a folder."""
    return sum(log.read_bytes().count(b"\n") for log in [*out.glob("commits*.jsonl"), *out.glob("*/commits*.jsonl")])


def wait_for_commits(out: Path, count: int, child: int) -> None:
    """Until so many tasks are committed, or the child that commits them has ended."""
    deadline = time.monotonic() + 60
    # the child stays a zombie, so that its id is its own, and whoever waits for it finds how it ended
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while commits(out) < count and time.monotonic() < deadline and not os.waitid(os.P_PID, child, look):
        time.sleep(0.0005)


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


def cache_all(src: Path, out: Path, model: FullCapacitor, how: frozenset[str]) -> Report:
    """A run in this process."""
    options = RunOptions(workers=0, progress=False, update="update" in how)
    if "views" in how:
        return cache_views(src, out, model, VIEWS, note=str, options=options)
    return cache_images(src, out, model, REQUEST, options=options)


def cache_at_leisure(src: Path, out: Path, model: FullCapacitor, how: frozenset[str]) -> int:
    """Exit code of a run that leaves the processor to whoever is to strike it."""
    os.nice(10)
    if "compact" in how:
        compact(out)
        return 3
    return cache_all(src, out, model, how).exit_code


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
        before = commits(out)
        child = in_child(lambda: cache_at_leisure(src, out, model, how))
        if len(died) < kills:
            # let it finish between none and three more tasks, then strike within the next one
            wait_for_commits(out, before + rng.randint(0, 3), child)
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
    """Exit codes of `count` processes that cache at once, of which `kills` are killed at random moments."""
    model = random_model()
    rng = random.Random(seed)
    children = [in_child(lambda rank=rank: cache_at_rank(src, out, model, rank, count, how)) for rank in range(count)]
    for child in rng.sample(children, kills):
        wait_for_commits(out, commits(out) + rng.randint(1, 3), child)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
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
    child = in_child(lambda: command("cache", str(src), str(out), "--model", str(model), *sizes))
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
