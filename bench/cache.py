"""Throughput of `capacitor-rt cache`: JPEG files on disk to latents on disk, and which stage limits it.

    python -m bench cache                              four sets of photographs, an encoder that computes nothing
    python -m bench cache --device cuda                the model on a GPU
    python -m bench cache --set 500 --images 5000 --workers 8 --folder /data/tmp

The photographs are made of the bundled ones, all different. Of each set three things are measured, one after the other
in the same run: one core that decodes and resizes (exact, fast, and with the resize left to the GPU), a whole run of
the cache, and a plain loop, Pillow in a DataLoader, with as many workers, which saves latents too. Both have the same
encoder; the null one has its latents before it is asked, as a GPU would, so that it takes no time of these cores, and
what `--decode gpu` or `--resize gpu` leave to a GPU takes none either (nvJPEG's own work on the host neither). Rates
are by the clock, whole and without the start (until the first images are there), and `cpu` is the CPU time of all
processes, starting them included. Prints a line for each and appends them as JSON to bench/results/cache-<gpu>.jsonl.
Needs the packages of the extra `cache`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from ._null import null_encoder, null_gpu, null_latents, null_model
from ._photos import SETS, PhotoSet

NEEDS = {"PIL": "pillow", "pyarrow": "pyarrow", "xxhash": "xxhash"}
WARM_IMAGES = 256
CHUNK_IMAGES = 64


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Images per second by the clock, and CPU milliseconds per image, of `work`, which gives the number of images."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    count = work()
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    return {"images_per_s": count / seconds, "cpu_ms": 1e3 * cpu / count, "seconds": seconds}


def start_seconds(folder: Path) -> float:
    """CPU time that starting one worker takes, whatever the number of images."""
    from capacitor_rt.cache.decoding import DecodePool
    from capacitor_rt.cache.sources import ColumnsRequest
    from capacitor_rt.cache.sources.files import folder_source
    from capacitor_rt.images.geometry import Size
    from capacitor_rt.images.load import PixelPolicy

    source = folder_source(folder, folder / "none", ColumnsRequest())

    def one() -> int:
        with DecodePool(source, PixelPolicy(), [Size(32, 32)], workers=1) as pool:
            for chunk in pool.decode([range(1)]):
                chunk.release()
        return 1

    return timed(one)["cpu_ms"] / 1e3


def one_core(files: Sequence[bytes], size: int, decode: str) -> float:
    """Images per second of CPU time of one thread that decodes and resizes; the better of two passes.

    With `decode` "deferred" it decodes exactly, cuts, and leaves the resizing to a GPU; with "gpu" the decoding, too.
    """
    from capacitor_rt.cache.resizing import RECORD_BYTES
    from capacitor_rt.images.encoded import load_encoded
    from capacitor_rt.images.geometry import Size
    from capacitor_rt.images.load import PixelPolicy, View, load_views
    from capacitor_rt.images.together import Together

    views = [View(PixelPolicy("exact" if decode == "deferred" else decode), (Size(size, size),))]
    are_records = decode in ("deferred", "gpu")
    outs = np.empty((CHUNK_IMAGES, RECORD_BYTES if are_records else views[0].slot), np.uint8)
    buffer, together = bytearray(), Together()

    def memory(nbytes: int) -> bytearray:
        nonlocal buffer
        if len(buffer) < nbytes:
            buffer = bytearray(nbytes)
        return buffer

    rates = []
    for _ in range(2):
        begin = time.thread_time()
        for number, data in enumerate(files):
            out = outs[number % len(outs)]
            if decode != "gpu" or load_encoded(data, views, out) is None:
                if are_records:
                    load_views(data, views, buffer=memory, records=out)
                else:
                    load_views(data, views, [out], buffer=memory, together=together)
        together.finish()
        rates.append(len(files) / (time.thread_time() - begin))
    return max(rates)


def cache_run(folder: Path, out: Path, model: Any, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Cache every file of `folder` into `out`; the figures of the run."""
    import capacitor_rt.cache.run as run_module
    from capacitor_rt.cache import CacheRequest, cache_images
    from capacitor_rt.cache.options import RunOptions

    reports = []
    on_gpu = model.device.type == "cuda"
    null = nullcontext() if on_gpu else null_gpu(args.decode, args.resize)

    def run() -> int:
        options = RunOptions(workers=args.workers, progress=False, resize=args.resize)
        encoder = run_module.BatchEncoder if on_gpu else null_encoder()
        with null, patch.object(run_module, "BatchEncoder", encoder):
            report = cache_images(folder, out, model, CacheRequest(side=size, decode=args.decode), options=options)
        reports.append(report)
        return report.new_images

    figures = timed(run)
    (report,) = reports
    meters = report.meters
    return figures | {
        "images": report.new_images,
        "quarantined": report.quarantined.total(),
        "running_images_per_s": report.new_images / meters.running,
        "start_seconds": meters.waits["start"],
        "decode_cpu_ms": 1e3 * meters.seconds["decode"] / report.new_images,
        "fill_ms": 1e3 * meters.seconds["fill"] / report.new_images,
        "workers": meters.workers,
        "occupancy": meters.occupancy(),
        "limited_by": meters.limit(),
        "device_waiting_percent": 100 * meters.device_waiting(),
        "latent_bytes": report.nbytes,
    }


def measure(photos: PhotoSet, root: Path, model: Any, args: argparse.Namespace, size: int) -> dict[str, Any]:
    """Everything of one set of photographs at one size."""
    from ._plain_loop import one_pass

    folder = root / "files"
    names = sorted(folder.iterdir())
    sample = [path.read_bytes() for path in names[: max(4, len(names) // 8)]]
    core = {decode: one_core(sample, size, decode) for decode in ("exact", "fast", "deferred", "gpu")}
    out = root / f"latents-{size}"
    line = {"core_images_per_s": core} | cache_run(folder, out, model, size, args)
    start = start_seconds(folder) if line["workers"] else 0.0
    line |= {"start_cpu_seconds": start, "running_cpu_ms": line["cpu_ms"] - 1e3 * start / line["images"]}
    started, first = time.perf_counter(), []
    encode = null_latents if model.device.type == "cpu" else model.encode
    plain: dict[str, Any] = timed(
        lambda: one_pass(folder, size, line["workers"], root / f"plain-{size}", encode, first)
    )
    running = line["images"] / (plain["seconds"] - (first[0] - started))
    plain |= {"loop_is_slower": plain["seconds"] / line["seconds"], "running_images_per_s": running}
    plain["running_is_slower"] = line["running_images_per_s"] / running
    return line | {"plain": plain}


def run(args: argparse.Namespace) -> int:
    """Measure what the command line asks for."""
    from capacitor_rt import ModelConfig

    from ._contenders import random_model
    from ._device import busy
    from ._processes import ending_on_sigterm
    from ._records import append_line, default_results
    from ._timing import environment

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    facts = environment(device) | {"busy": busy(device)}
    torch.set_num_threads(1)
    model = random_model(ModelConfig()).to(device, torch.bfloat16) if on_gpu else null_model()
    encoder = "full_capacitor" if on_gpu else "null"
    backend = "triton" if model.runtime else "torch"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    out = args.out or default_results(device, "cache")
    chosen = [photos for photos in SETS if not args.set or photos.name in args.set]
    with ending_on_sigterm(), tempfile.TemporaryDirectory(dir=args.folder, prefix="capacitor-bench-") as name:
        for photos in chosen:
            root, count = Path(name) / photos.name, args.images or photos.count
            nbytes = photos.write(root / "files", count, cores)
            if on_gpu:
                photos.write(root / "warm", min(count, WARM_IMAGES), cores)
            print(
                f"{count} JPEG files of {photos.width}x{photos.height}, {nbytes / count / 1e3:.0f} kB each", flush=True
            )
            for size in args.size or (256,):
                if on_gpu:
                    cache_run(root / "warm", root / f"warm-{size}", model, size, args)
                line = {"bench": "cache", "size": size, "file_size": f"{photos.width}x{photos.height}"}
                line |= {"file_bytes": nbytes, "encoder": encoder, "backend": backend, "cores": cores}
                line |= measure(photos, root, model, args, size) | facts
                line |= {"decode": args.decode, "resize": args.resize}
                append_line(out, line)
                _print(line)
    return 0


def _print(line: dict[str, Any]) -> None:
    core, plain = line["core_images_per_s"], line["plain"]
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in line["occupancy"].items())
    print(f"  to {line['size']}x{line['size']}, {line['encoder']} encoder, {line['workers']} workers")
    left = f"{core['deferred']:.1f} with the resize left to the GPU, {core['gpu']:.1f} with the decoding, too"
    print(f"  one core     {core['exact']:8.1f} images/s exact, {core['fast']:.1f} fast, {left}")
    print(f"  cache        {line['images_per_s']:8.1f} images/s, cpu {line['cpu_ms']:.2f} ms per image; {shares}")
    print(
        f"  once started {line['running_images_per_s']:8.1f} images/s, cpu {line['running_cpu_ms']:.2f} ms per image, "
        f"of which decode {line['decode_cpu_ms']:.2f}; limited by {line['limited_by']}"
    )
    print(
        f"  plain loop   {plain['images_per_s']:8.1f} images/s, cpu {plain['cpu_ms']:.2f} ms per image: "
        f"{plain['loop_is_slower']:.2f} times the cache's time; once started {plain['running_images_per_s']:.1f}, "
        f"{plain['running_is_slower']:.2f} times",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 also where a package is absent, which is said in one line."""
    parser = argparse.ArgumentParser(prog="python -m bench cache", description=__doc__.splitlines()[0])
    names = [photos.name for photos in SETS]
    parser.add_argument("--set", action="append", choices=names, help="Photographs of this width; default all.")
    parser.add_argument("--images", type=int, help="Write and cache this many files of each set.")
    parser.add_argument("--size", type=int, action="append", help="Cache at this many pixels per side; default 256.")
    parser.add_argument("--decode", choices=("exact", "fast", "gpu"), default="exact", help="How the cache decodes.")
    parser.add_argument("--resize", choices=("auto", "cpu", "gpu"), default="auto", help="Where the cache resizes.")
    parser.add_argument(
        "--folder", type=Path, help="Put files and latents below this folder, and remove them at the end."
    )
    parser.add_argument("--workers", type=int, help="Read and decode in this many processes.")
    parser.add_argument(
        "--device",
        default="cpu",
        choices=("cuda", "cpu"),
        help="cuda runs the model; cpu, the default, an encoder that computes nothing.",
    )
    parser.add_argument("--out", type=Path, help="Append to this file instead of bench/results/cache-<gpu>.jsonl.")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: run on one, or use --device cpu for the decoding alone", file=sys.stderr)
        return 2
    if args.images is not None and args.images < 1:
        parser.error(f"--images {args.images} is too few: give at least 1")
    missing = [name for module, name in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"caching not measured: {', '.join(missing)} not installed: pip install '.[cache]'")
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
