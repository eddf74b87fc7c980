"""What a cache of many inputs, and of huge ones, takes: memory over time, restarts, and the peak of many workers.

    python -m bench scale                       a hundred thousand rows, and 16 workers with images of 160 megapixels
    python -m bench scale --case rows --rows 1000000 --folder /data/tmp
    python -m bench scale --case pixels --workers 16
    python -m bench scale --case update --rows 1000000

`rows`: Parquet files of tiny images, of which a few repeat, cached with an encoder that computes nothing. The memory of
the coordinator and of its workers is looked at each second; what counts is what they have more of at the end than after
a fifth of the run, and the peak per row. Then what begins anew on the finished cache, each in a process of its own: the
same command, `status`, `verify`, opening a `LatentDataset` and updating by a file. `pixels`: each worker has images of
160 megapixels at a time (JPEG, progressive JPEG, PNG), a strip of 2x1300 that its bucket enlarges to 170 megapixels,
and headers of pictures that nobody could hold; the peak of all processes together is compared with the pixel budget.
`update`: a cache of files that were never decoded (a kilobyte of disk for each), updated by a hundred.
Memory is PSS: what processes share counts once. Prints lines and appends them to bench/results/scale-<gpu>.jsonl.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from ._memory import watched

GROUP = 8192
GROUPS_PER_FILE = 4
SIDE = 32
PIXELS = 160_000_000
FEWEST_ROWS = 100_000
ROOM = 96 << 20
"""What a run of many rows may come to have more of, in all its processes together, than after a fifth of it."""
PER_WORKER = 64 << 20
"""Beside the pixel budget: a worker's share of what the helper has."""


def write_rows(folder: Path, count: int) -> None:
    """Parquet files of `count` tiny JPEG images; there are 64 different ones, and a column of numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder.mkdir(parents=True)
    rng, images = np.random.default_rng(0), []
    for _ in range(64):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(data, "JPEG")
        images.append(data.getvalue())
    for number, first in enumerate(range(0, count, GROUP * GROUPS_PER_FILE)):
        rows = range(first, min(first + GROUP * GROUPS_PER_FILE, count))
        table = pa.table({"image": pa.array([images[i % 64] for i in rows], pa.binary()), "label": pa.array(rows)})
        pq.write_table(table, folder / f"{number:05d}.parquet", row_group_size=GROUP)


def picture(format: str, pixels: int, **options: Any) -> bytes:
    """The bytes of a square picture of so many pixels."""
    from PIL import Image

    side = int(pixels**0.5)
    ramp = np.add.outer(np.arange(side) // 40, np.arange(side) // 50).astype(np.uint8)
    data = io.BytesIO()
    Image.merge("RGB", [Image.fromarray(ramp), Image.fromarray(ramp.T.copy()), Image.fromarray(ramp)]).save(
        data, format, **options
    )
    return data.getvalue()


def hostile() -> dict[str, bytes]:
    """Small files that say of themselves that they are pictures of billions of pixels, or become them."""
    from PIL import Image

    strip, jpeg, png, gif = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (2, 1300), (10, 200, 30)).save(strip, "PNG")
    Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
    Image.new("RGB", (64, 64)).save(png, "PNG")
    Image.new("P", (64, 64)).save(gif, "GIF")
    frame = jpeg.getvalue().index(b"\xff\xc0")
    wide = jpeg.getvalue()[: frame + 5] + b"\xff\xff\xff\xff" + jpeg.getvalue()[frame + 9 :]
    header = png.getvalue()
    import zlib

    chunk = b"IHDR" + b"\x7f\xff\xff\xff" * 2 + header[24:29]
    tall = header[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + header[33:]
    screen = gif.getvalue()[:6] + b"\xff\xff\xff\xff" + gif.getvalue()[10:]
    return {"strip.png": strip.getvalue(), "65535.jpg": wide, "2147483647.png": tall, "65535.gif": screen}


def write_pixels(folder: Path, each: int, pixels: int) -> int:
    """`each` links to a picture of each kind, and hostile ones; the number of files."""
    folder.mkdir(parents=True)
    kinds = {
        "base.jpg": ("JPEG", {"quality": 80}),
        "progressive.jpg": ("JPEG", {"quality": 80, "progressive": True}),
        "plain.png": ("PNG", {"compress_level": 1}),
    }
    for name, (format, options) in kinds.items():
        (folder / f"000-{name}").write_bytes(picture(format, pixels, **options))
        for i in range(1, each):
            os.link(folder / f"000-{name}", folder / f"{i:03d}-{name}")
    for name, data in hostile().items():
        (folder / f"x-{name}").write_bytes(data)
    return len(os.listdir(folder))


def cache(src: str, out: str, workers: str, side: str, update: str = "") -> dict[str, Any]:
    """Cache with an encoder that computes nothing."""
    import torch

    import capacitor_rt.cache.run as run_module
    from capacitor_rt.cache import CacheRequest, cache_images
    from capacitor_rt.cache.options import RunOptions

    from ._null import null_encoder, null_model

    torch.set_num_threads(1)
    # the same model in every process
    torch.manual_seed(0)
    options = RunOptions(workers=int(workers), progress=False, image_timeout=600.0, update=bool(update))
    with patch.object(run_module, "BatchEncoder", null_encoder()):
        report = cache_images(src, out, null_model(), CacheRequest(side=int(side)), options=options)
    return {
        "inputs": report.inputs,
        "cached": report.cached,
        "new": report.new_images,
        "quarantined": dict(report.quarantined),
        "unfinished": report.unfinished,
    }


def look(out: str) -> dict[str, Any]:
    from capacitor_rt.cache.status import status

    return status(out).to_json()


def check(out: str) -> dict[str, Any]:
    from capacitor_rt.cache.verify import verify

    return {"problems": len(verify(out).problems)}


def opened(out: str) -> dict[str, Any]:
    from capacitor_rt.cache import LatentDataset

    return {"rows": len(LatentDataset(out))}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {"cache": cache, "status": look, "verify": check, "open": opened}


def step(name: str, *arguments: object) -> dict[str, Any]:
    """A step in a process of its own; as `watched`, with the seconds of the step alone and what its process had."""
    found = watched(["-m", "bench.scale", "--step", name, *map(str, arguments)])
    return found | found.pop("result")


def _step(name: str, *arguments: str) -> int:
    # what every process has loaded is no part of a step
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401

    import capacitor_rt.cache  # noqa: F401

    begin, cpu = time.perf_counter(), time.process_time()
    # the peak of this process begins anew
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    result = STEPS[name](*arguments)
    after = _memory("VmHWM")
    took = {"step_seconds": time.perf_counter() - begin, "step_cpu": time.process_time() - cpu}
    print(json.dumps({"result": result, "more_bytes": after - before, **took}))
    return 0


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def growth(samples: Sequence[tuple[float, int, int]]) -> tuple[int, int]:
    """By how much the coordinator, and all others together, grow from a fifth of the run to its last tenth, bytes."""
    end = samples[-1][0]
    early = [s for s in samples if 0.15 * end <= s[0] <= 0.25 * end]
    late = [s for s in samples if 0.85 * end <= s[0] <= 0.95 * end]
    first, last = (np.median([s[1:] for s in part], axis=0) for part in (early, late))
    return int(last[0] - first[0]), int(last[1] - first[1])


def rows_case(root: Path, rows: int, workers: int) -> dict[str, Any]:
    """A cache of many rows, and what begins anew on it."""
    src, out = root / "src", root / "out"
    write_rows(src, rows)
    run = step("cache", src, out, workers, SIDE)
    samples = run.pop("samples")
    own, others = growth(samples)
    line: dict[str, Any] = {"case": "rows", "rows": rows, "workers": workers, "run": run}
    line |= {"coordinator_growth": own, "worker_growth": others, "samples": samples[:: max(1, len(samples) // 100)]}
    print(
        f"{rows} rows in {run['step_seconds']:.0f} s ({rows / run['step_seconds']:.0f}/s, {workers} workers): peak "
        f"{run['peak'] / 1e6:.0f} MB; from a fifth of the run to its end {own / 1e6:+.1f} MB in the coordinator, "
        f"{others / 1e6:+.1f} in the others",
        flush=True,
    )
    assert run["result"]["cached"] == rows
    steps = {
        "again": ("cache", src, out, workers, SIDE),
        "status": ("status", out),
        "verify": ("verify", out),
        "opened first": ("open", out),
        "opened again": ("open", out),
    }
    for name, (what, *arguments) in steps.items():
        line[name] = step(what, *arguments)
        del line[name]["samples"]
        _print_step(name, line[name], rows)
    write_rows(root / "more", 100)
    (root / "more" / "00000.parquet").rename(src / "z.parquet")
    line["update"] = step("cache", src, out, workers, SIDE, "update")
    del line["update"]["samples"]
    _print_step("update by 100", line["update"], rows)
    # of a short run a fifth is its start
    line["is_flat"] = own + others < ROOM if rows >= FEWEST_ROWS else None
    return line


def update_case(root: Path, rows: int) -> dict[str, Any]:
    """An update of a cache of many files by a hundred."""
    import torch

    from ._synthetic_cache import write_cache, write_names
    from .cache import null_model

    torch.manual_seed(0)
    write_names(root / "src", rows)
    write_cache(root / "src", root / "out", null_model())
    write_names(root / "src" / "z", 100)
    found = step("cache", root / "src", root / "out", 1, SIDE, "update")
    del found["samples"]
    _print_step("update by 100", found, rows)
    assert found["result"]["new"] == 100
    return {"case": "update", "rows": rows, "update": found}


def _print_step(name: str, found: dict[str, Any], rows: int) -> None:
    print(
        f"  {name:14s} {found['step_seconds']:6.2f} s, {found['step_cpu']:6.2f} of CPU time; "
        f"{found['more_bytes'] / 1e6:7.1f} MB more at the peak ({found['more_bytes'] / rows:.0f} bytes per row)",
        flush=True,
    )


def pixels_case(root: Path, workers: int, pixels: int) -> dict[str, Any]:
    """Images of many megapixels in every worker at once."""
    from capacitor_rt.cache.options import RunOptions

    src = root / "src"
    count = write_pixels(src, workers, pixels)
    run = step("cache", src, root / "out", workers, 512)
    del run["samples"]
    budget = RunOptions().pixel_budget
    line = {"case": "pixels", "workers": workers, "pixels": pixels, "budget": budget, "files": count, "run": run}
    line["is_within"] = run["peak"] < budget + workers * PER_WORKER
    print(
        f"{workers} workers, {count} files, {pixels / 1e6:.0f} megapixels each: peak {run['peak'] / 1e6:.0f} MB of all "
        f"processes, budget {budget / 1e6:.0f} MB for pixels; {run['step_seconds']:.0f} s; {run['result']}",
        flush=True,
    )
    return line


def run(args: argparse.Namespace) -> int:
    """Measure what the command line asks for; 1 where a bound is broken."""
    import torch

    from ._device import busy
    from ._processes import ending_on_sigterm
    from ._records import append_line, default_results
    from ._timing import environment

    device = torch.device("cpu")
    facts = environment(device) | {"busy": busy(device)}
    sound = True
    for case in args.case or ("rows", "pixels"):
        with ending_on_sigterm(), tempfile.TemporaryDirectory(dir=args.folder, prefix="capacitor-bench-") as name:
            if case == "rows":
                line = rows_case(Path(name), args.rows, args.row_workers)
            elif case == "update":
                line = update_case(Path(name), args.rows)
            else:
                line = pixels_case(Path(name), args.workers, args.pixels)
        sound &= line.get("is_flat") is not False and line.get("is_within", True)
        append_line(args.out or default_results(device, "scale"), {"bench": "scale"} | line | facts)
    return 0 if sound else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--step"]:
        return _step(*given[1:])
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", action="append", choices=("rows", "pixels", "update"), help="What to measure; default the first two."
    )
    parser.add_argument("--rows", type=int, default=100_000, help="Rows of the cache of many.")
    parser.add_argument("--row-workers", type=int, default=1, help="Decode the many rows in this many processes.")
    parser.add_argument("--workers", type=int, default=16, help="Decode the large images in this many processes.")
    parser.add_argument("--pixels", type=int, default=PIXELS, help="Pixels of a large image.")
    parser.add_argument("--folder", type=Path, help="Put everything below this folder, and remove it at the end.")
    parser.add_argument("--out", type=Path, help="Append to this file instead of bench/results/scale-<gpu>.jsonl.")
    return run(parser.parse_args(given))


if __name__ == "__main__":
    raise SystemExit(main())
