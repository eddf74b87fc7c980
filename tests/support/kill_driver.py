"""Run as a script, for the tests of interrupted runs: children are forked after the imports, so they start at once.

`kill SRC OUT COUNT SEED` caches SRC into OUT in a child, kills it at a random moment, and so on until one ends by
itself. Prints how far the cache was (committed tasks) when each died.
`share SRC OUT COUNT KILLS SEED` caches SRC into OUT in COUNT children at once, kills some of them, and prints how much
each has read and their exit codes.
`signal SRC MODEL OUT NUMBER [OUT NUMBER ...]` runs the command in a child for each OUT, sends it a signal after its
first task, and prints the exit codes.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import typer
from models import random_model

from capacitor_rt import FullCapacitor
from capacitor_rt.cache import CacheRequest, cache_images
from capacitor_rt.cli.cache import cache, verify
from capacitor_rt.extras import require_extra

REQUEST = CacheRequest(32, area=True, dtype="fp32", posterior=True, flip=True, task_inputs=3, batch=2)


def commits(out: Path) -> int:
    log = out / "commits.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_commits(out: Path, count: int) -> None:
    deadline = time.monotonic() + 20
    while commits(out) < count and time.monotonic() < deadline:
        time.sleep(0.0005)


def in_child(function) -> int:
    """Fork, call `function` in the child and end it with what that returns; the child's process id."""
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


def cache_at_leisure(src: Path, out: Path, model: FullCapacitor) -> int:
    """Exit code of a run that leaves the processor to whoever is to strike it."""
    os.nice(10)
    return cache_images(src, out, model, REQUEST, workers=0, progress=False).exit_code


def kill_until_done(src: Path, out: Path, kills: int, seed: int) -> list[int]:
    model = random_model()
    rng = random.Random(seed)
    died: list[int] = []
    while True:
        before = commits(out)
        child = in_child(lambda: cache_at_leisure(src, out, model))
        if len(died) < kills:
            # let it finish between none and three more tasks, then strike within the next one
            wait_for_commits(out, before + rng.randint(0, 3))
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            died.append(commits(out))
            continue
        assert os.WEXITSTATUS(status) == 3, f"the run ended with {os.WEXITSTATUS(status)}"
        return died


def share(src: Path, out: Path, count: int, kills: int, seed: int) -> list[int]:
    """Exit codes of `count` processes that cache at once, of which `kills` are killed at random moments."""
    model = random_model()
    rng = random.Random(seed)
    children = [in_child(lambda rank=rank: cache_at_rank(src, out, model, rank, count)) for rank in range(count)]
    for child in rng.sample(children, kills):
        wait_for_commits(out, commits(out) + rng.randint(1, 3))
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def cache_at_rank(src: Path, out: Path, model: FullCapacitor, rank: int, count: int) -> int:
    """Exit code of one of several runs; prints how many inputs it has read."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    report = cache_images(src, out, model, REQUEST, workers=0, progress=False)
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
    wait_for_commits(out, 1)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in ("pyarrow.parquet", "xxhash"):
        require_extra(module)
    mode, src, second, *rest = sys.argv[1:]
    if mode == "kill":
        print(*kill_until_done(Path(src), Path(second), *map(int, rest)))
    elif mode == "share":
        print("codes", *share(Path(src), Path(second), *map(int, rest)))
    else:
        outs, numbers = map(Path, rest[::2]), map(int, rest[1::2])
        print(*(signal_command(Path(src), out, Path(second), n) for out, n in zip(outs, numbers, strict=True)))
