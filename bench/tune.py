"""Measure candidate configs and keep the best as a row of kernels/configs: the only writer of measured rows.

    python -m bench.tune --op expand --op project --size 128x256 --size 32x512          print what would change
    python -m bench.tune --op project --size 1x256 --use latency --write                write it

Candidates are tiles around the shipped ones and every config that ships for another GPU. One that would spill, does
not fit shared memory or disagrees with plain torch is passed over. Each is timed in turn with the present config,
interleaved, and wins by the ratio of medians, so drifting clocks do not decide.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[1] / "kernels" / "configs"
# a new config must be this much faster before a row changes
WORTHWHILE = 0.99
FACTS = ("gpu", "driver_version", "torch", "triton", "commit", "date")
TILES = ((128, 128), (128, 64), (64, 128), (64, 64), (128, 256), (256, 128))


@dataclass(frozen=True)
class Trial:
    """A candidate's median time and its ratio to the present config's, measured side by side."""

    config: Any
    us: float
    ratio: float


def candidates(family: Any, present: Any, cc: int) -> list[Any]:
    """Configs worth a measurement, the present one left out."""
    from capacitor_kernels import tuning

    found = [row.config for known in tuning.COMPUTE_CAPABILITIES for row in tuning.rows(known, family.name)]
    if family.config is tuning.GemmConfig:
        for block_m, block_n in TILES:
            for block_k, stages in ((64, 3), (64, 4), (32, 4)):
                for warps in (4, 8):
                    small = replace(present, block_m=block_m, block_n=block_n, block_k=block_k, maxnreg=None)
                    found.append(replace(small, num_warps=warps, num_stages=stages))
    if cc < 90:
        found = [config for config in found if not getattr(config, "tma", False)]
    return [config for config in dict.fromkeys(found) if config != present]


def fits(family: Any, shape: dict[str, int], dtype: Any, config: Any, cc: int) -> bool:
    """Whether the config compiles for this GPU without spills and within shared memory."""
    from capacitor_kernels import tuning

    from .aot import compile_launch

    base = tuning.base_cc(cc)
    for launch in family.example(shape, dtype, config):
        try:
            kernel, _, stack = compile_launch(launch, cc)
        except Exception as error:  # the compiler raises whatever it likes on a tile it cannot do
            print(f"  passed over {config}: {str(error).splitlines()[0][:100]}")
            return False
        if stack > 0 or kernel.metadata.shared > tuning.LIMITS[base].smem_per_cta:
            return False
    return True


def tune(case: Any, device: Any, replays: int, compile_first: bool = True) -> tuple[dict[str, int], Any, list[Trial]]:
    """(row shape, present config, trials from best to worst) of one launch."""
    from capacitor_kernels import tuning
    from capacitor_kernels.launch import compute_capability

    cc = compute_capability(device)
    family = next(f for f in tuning.families() if f.name == case.op)
    shape = _shape_of(case, device)
    present = tuning.lookup(case.op, cc, shape, case.dtype, case.size.use)
    trials = []
    for config in candidates(family, present, cc):
        if compile_first and not fits(family, shape, case.dtype, config, cc):
            continue
        trial = _trial(case, device, present, config, replays)
        if trial is not None:
            trials.append(trial)
    return shape, present, sorted(trials, key=lambda trial: trial.ratio)


def _shape_of(case: Any, device: Any) -> dict[str, int]:
    """The shape that the case's launch looks its config up by."""
    from capacitor_kernels import tuning
    from capacitor_kernels.launch import compute_capability

    family = next(f for f in tuning.families() if f.name == case.op)
    any_shape = dict.fromkeys((*family.exact, *family.near), 256)
    config = family.default(compute_capability(device), any_shape, case.dtype, case.size.use)
    with tuning.using(case.op, config) as seen:
        case.prepare(device).launch()
    return seen[-1]


def _trial(case: Any, device: Any, present: Any, config: Any, replays: int) -> Trial | None:
    from capacitor_kernels import tuning

    from ._timing import Variant, time_variants
    from .kernels import AGREEMENT, difference

    with tuning.using(case.op, config):
        gap = difference(case, device)
    if not gap <= AGREEMENT[str(case.dtype).removeprefix("torch.")]:
        print(f"  passed over {config}: differs from plain torch by {gap:.1e}")
        return None

    def with_config(chosen: Any) -> Any:
        # launches look their config up when called: once while the graph is captured, or at every plain call
        with tuning.using(case.op, chosen):
            launch = case.prepare(device).launch

        def call() -> None:
            with tuning.using(case.op, chosen):
                launch()

        return call

    variants = [
        Variant("present", lambda: with_config(present), case.nbytes),
        Variant("candidate", lambda: with_config(config), case.nbytes),
    ]
    timed = time_variants(variants, device, replays)
    return Trial(config, timed["candidate"].us, timed["candidate"].us / timed["present"].us)


def write_row(folder: Path, cc: int, family: str, row: dict[str, Any]) -> None:
    """Put a row into sm_<cc>.json, in place of the row of the same shape, dtype and use if there is one."""
    path = folder / f"sm_{cc}.json"
    document = json.loads(path.read_text()) if path.exists() else {"compute_capability": cc, "families": {}}
    rows = document["families"].setdefault(family, [])
    same = [i for i, old in enumerate(rows) if all(old[key] == row[key] for key in ("shape", "dtype", "use"))]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)
    blocks = [
        f'  "{name}": [\n' + ",\n".join("   " + json.dumps(line) for line in lines) + "\n  ]"
        for name, lines in document["families"].items()
    ]
    text = f'{{\n "compute_capability": {cc},\n "families": {{\n' + ",\n".join(blocks) + "\n }\n}\n"
    json.loads(text)
    part = path.with_suffix(".json.tmp")
    part.write_text(text)
    os.replace(part, path)


def run(args: argparse.Namespace) -> int:
    """Tune what the command line asks for."""
    import torch

    from capacitor_kernels.launch import INTERPRETED, compute_capability, dtype_name
    from capacitor_kernels.tuning import base_cc

    from . import _cases as catalogue
    from ._timing import environment
    from .kernels import parse_size

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    unknown = sorted(set(args.op) - set(catalogue.builders()))
    if unknown:
        raise SystemExit(f"--op {' '.join(unknown)} unknown: choose from {' '.join(catalogue.builders())}")
    sizes = [parse_size(text, args.use) for text in args.size]
    sizes = sizes or (catalogue.GPU_SIZES[:2] if on_gpu else catalogue.TINY_SIZES[:1])
    dtype = torch.bfloat16 if on_gpu else torch.float32
    facts = environment(device)
    for case in catalogue.cases(args.op, sizes, dtype):
        replays = 15 if on_gpu else 2
        shape, present, trials = tune(case, device, replays, compile_first=not INTERPRETED)
        print(f"{case.op} {case.size} {shape}: present {present}")
        for trial in trials[:5]:
            print(f"  x{trial.ratio:.3f} {trial.us:9.1f} us {trial.config}", flush=True)
        if not trials or trials[0].ratio > WORTHWHILE:
            print("  the present config stays")
        elif args.write:
            evidence = {"kind": "measured", "us": round(trials[0].us, 2)} | {key: facts.get(key) for key in FACTS}
            row = {"shape": shape, "dtype": dtype_name(dtype), "use": case.size.use}
            row |= {"config": asdict(trials[0].config), "evidence": evidence}
            write_row(Path(args.configs), base_cc(compute_capability(device)), case.op, row)
            print("  written")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", default=[], help="launch to tune; all when absent")
    parser.add_argument("--size", action="append", default=[], help="BATCHxPIXELS, e.g. 128x256")
    parser.add_argument("--use", default="throughput", choices=("throughput", "latency"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the command itself out")
    parser.add_argument("--configs", default=str(CONFIGS), help="folder of the config files")
    parser.add_argument("--write", action="store_true", help="write winners into the config files")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        # before triton is imported, which happens in run()
        os.environ["TRITON_INTERPRET"] = "1"
        if args.write and Path(args.configs).resolve() == CONFIGS:
            print("--write with --device cpu would ship interpreter times: give another --configs", file=sys.stderr)
            return 2
    else:
        import torch

        if not torch.cuda.is_available():
            print("no CUDA GPU here: run on one, or use --device cpu to try the command out", file=sys.stderr)
            return 2
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
