"""Measure candidate configs and keep the best as a row of kernels/configs: the only writer of measured rows.

    python -m bench tune --op expand --op project --size 128x256 --size 32x512          print what would change
    python -m bench tune --op project --size 1x256 --use latency --write                write it

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


def fits(case: Any) -> bool:
    """Whether every launch of a case compiles for its GPU without spills and within shared memory."""
    from capacitor_kernels import tuning

    from .aot import compile_launch

    for launch in case.launches():
        try:
            kernel, _, stack = compile_launch(launch, case.cc)
        except Exception as error:  # the compiler raises whatever it likes on a tile it cannot do
            print(f"  passed over {case.step.options['config']}: {str(error).splitlines()[0][:100]}")
            return False
        if stack > 0 or kernel.metadata.shared > tuning.limits(case.cc).smem_per_cta:
            return False
    return True


def tune(case: Any, device: Any, replays: int, compile_first: bool = True) -> tuple[dict[str, int], Any, list[Trial]]:
    """(row shape, present config, trials from best to worst) of one op."""
    from capacitor_kernels import tuning

    family = tuning.get_family(case.op)
    present = case.step.options["config"]
    trials = []
    for config in candidates(family, present, case.cc):
        candidate = case.with_config(config)
        if compile_first and not fits(candidate):
            continue
        trial = _trial(case, candidate, device, replays)
        if trial is not None:
            trials.append(trial)
    return case.row_shape(), present, sorted(trials, key=lambda trial: trial.ratio)


def _trial(present: Any, candidate: Any, device: Any, replays: int) -> Trial | None:
    from ._timing import Variant, time_variants
    from .kernels import AGREEMENT, difference

    config, gap = candidate.step.options["config"], difference(candidate, device)
    if not gap <= AGREEMENT[str(candidate.dtype).removeprefix("torch.")]:
        print(f"  passed over {config}: differs from plain torch by {gap:.1e}")
        return None
    variants = [
        Variant(name, lambda case=case: case.prepare(device).call, case.step.nbytes)
        for name, case in (("present", present), ("candidate", candidate))
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
    from capacitor_rt import ModelConfig

    from ._cases import GPU_IMAGES, TINY_IMAGES, make_cases
    from ._contenders import TINY
    from ._timing import environment
    from .kernels import parse_images, parse_ops

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    usual = GPU_IMAGES[:2] if on_gpu else TINY_IMAGES[:1]
    images = [parse_images(text, args.use) for text in args.size] or usual
    model = ModelConfig() if on_gpu else TINY
    dtype = torch.bfloat16 if on_gpu else torch.float32
    facts = environment(device)
    for case in make_cases(parse_ops(args.op), images, model, dtype, compute_capability(device)):
        replays = 15 if on_gpu else 2
        shape, present, trials = tune(case, device, replays, compile_first=not INTERPRETED)
        print(f"{case.op} {case.images} {shape}: present {present}")
        for trial in trials[:5]:
            print(f"  x{trial.ratio:.3f} {trial.us:9.1f} us {trial.config}", flush=True)
        if not trials or trials[0].ratio > WORTHWHILE:
            print("  the present config stays")
        elif args.write:
            evidence = {"kind": "measured", "us": round(trials[0].us, 2)} | {key: facts.get(key) for key in FACTS}
            row = {"shape": shape, "dtype": dtype_name(dtype), "use": case.images.use}
            row |= {"config": asdict(trials[0].config), "evidence": evidence}
            write_row(Path(args.configs), base_cc(case.cc), case.op, row)
            print("  written")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", default=[], help="Tune this op instead of all.")
    parser.add_argument(
        "--size", action="append", default=[], help="Take BATCHxPIXELS images, e.g. 128x256, instead of the usual ones."
    )
    parser.add_argument(
        "--use", default="throughput", choices=("throughput", "latency"), help="Tune configs for this use."
    )
    parser.add_argument(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="Measure there; cpu only tries the command itself out.",
    )
    parser.add_argument("--configs", default=str(CONFIGS), help="Write into the config files of this folder.")
    parser.add_argument("--write", action="store_true", help="Write what won into the config files.")
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
