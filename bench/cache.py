"""Throughput of `capacitor-rt cache`: JPEG files on disk to latents on disk, and which stage limits it.

    python -m bench cache                              2048 JPEG files of 512x512, cached at 256 and 512 pixels
    python -m bench cache --images 20000 --size 512 --folder /data/tmp
    python -m bench cache --device cpu                 a few small files and a tiny model, to test the benchmark itself

The files are written first, all different, with the detail of photographs. A first run over a few of them compiles the
kernels and captures the graphs and is not counted. Prints a line for each size and appends it as JSON to
bench/results/cache-<gpu>.jsonl: images per second by the wall clock, and the share of its time that each stage worked.
Needs the packages of the extra `cache`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

NEEDS = {"PIL": "pillow", "pyarrow": "pyarrow", "xxhash": "xxhash"}
JPEG_QUALITY = 90
WARM_IMAGES = 256


def write_jpegs(folder: Path, count: int, side: int, workers: int) -> int:
    """Write `count` different JPEG files of `side` x `side` pixels; bytes in all."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    detail = [rng.normal(0, 100 / 1.5**i, (2**i + 1, 2**i + 1, 3)) for i in range(1, 9) if 2**i <= side]
    # octaves of noise fall off like a photograph's spectrum, so that a file has a photograph's size and decode time
    picture = sum(np.asarray([_enlarge(d[..., c], side) for c in range(3)]).transpose(1, 2, 0) for d in detail)

    def write(i: int) -> int:
        shift = np.roll(picture, (37 * i % side, 101 * i % side), (0, 1))
        pixels = np.clip(128 + shift * (0.7 + 0.3 * (i % 7) / 6), 0, 255).astype(np.uint8)
        path = folder / f"{i:06d}.jpg"
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)
        return path.stat().st_size

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(write, range(count)))


def _enlarge(channel: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(channel.astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def measure(folder: Path, out: Path, model: Any, size: int, workers: int | None) -> dict[str, Any]:
    """Cache every file of `folder` into `out`; the figures of the run."""
    from capacitor_rt.cache import CacheRequest, cache_images

    report = cache_images(folder, out, model, CacheRequest(side=size), workers=workers, progress=False)
    meters = report.meters
    # the shares are of the pipeline's own wall time; planning the run reads every header before it
    return {
        "images": report.new_images,
        "quarantined": report.quarantined.total(),
        "seconds": report.seconds,
        "pipeline_seconds": meters.wall,
        "images_per_s": report.new_images / meters.wall,
        "workers": meters.threads,
        "occupancy": meters.occupancy(),
        "limited_by": meters.limit(),
        "device_waiting_percent": 100 * (1 - min(1.0, meters.occupancy()["encode"])),
        "latent_bytes": report.nbytes,
    }


def run(args: argparse.Namespace) -> int:
    """Measure what the command line asks for."""
    from capacitor_rt import ModelConfig

    from ._contenders import TINY, random_model
    from ._device import busy
    from ._processes import ending_on_sigterm
    from ._records import append_line, default_results
    from ._timing import environment

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    sizes = args.size or ((256, 512) if on_gpu else (64,))
    count, side = args.images or (2048 if on_gpu else 6), 512 if on_gpu else 96
    facts = environment(device) | {"busy": busy(device)}
    model = random_model(ModelConfig() if on_gpu else TINY)
    model.backend = "auto" if on_gpu else "torch"
    model.to(device, torch.bfloat16 if on_gpu else torch.float32)
    cores = os.cpu_count() or 1
    out = args.out or default_results(device, "cache")
    with ending_on_sigterm(), tempfile.TemporaryDirectory(dir=args.folder, prefix="capacitor-bench-") as name:
        root = Path(name)
        nbytes = write_jpegs(root / "files", count, side, cores)
        write_jpegs(root / "warm", min(count, WARM_IMAGES), side, cores)
        print(f"{count} JPEG files of {side}x{side}, {nbytes / count / 1e3:.0f} kB each", flush=True)
        for size in sizes:
            measure(root / "warm", root / f"warm-{size}", model, size, args.workers)
            line = {"bench": "cache", "size": size, "file_size": side, "file_bytes": nbytes, "weights": "random"}
            line |= {"model": "full_capacitor", "backend": "triton" if model.runtime else "torch", "cores": cores}
            line |= measure(root / "files", root / f"latents-{size}", model, size, args.workers) | facts
            append_line(out, line)
            shares = ", ".join(f"{stage} {share:.0%}" for stage, share in line["occupancy"].items())
            print(f"to {size}x{size}: {line['images_per_s']:.1f} images/s; {shares}; limited by {line['limited_by']}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 also where a package is absent, which is said in one line."""
    parser = argparse.ArgumentParser(prog="python -m bench cache", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="Write and cache this many files.")
    parser.add_argument("--size", type=int, action="append", help="Cache at this many pixels per side.")
    parser.add_argument(
        "--folder", type=Path, help="Put files and latents below this folder, and remove them at the end."
    )
    parser.add_argument("--workers", type=int, help="Read and decode in this many threads.")
    parser.add_argument(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="Measure there; cpu only tries the command itself out.",
    )
    parser.add_argument("--out", type=Path, help="Append to this file instead of bench/results/cache-<gpu>.jsonl.")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: run on one, or use --device cpu to try the benchmark out", file=sys.stderr)
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
