"""Command line of the launches; one line per case, exit code 1 where one went wrong."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

EARLY_FROM = 90


def _named(cc: int, dtype: Any) -> Iterator[tuple[str, Any]]:
    """Every case of the self-check, and what makes its launches."""
    from capacitor_rt.runtime.launch_cases import FULL, cases

    from .launching import by_specialised_warps, launches_of

    for case in cases(FULL, dtype, cc):
        yield case.name, partial(launches_of, case, cc)
    if cc == 90:
        yield "expand by specialised warps", by_specialised_warps


def main() -> int:
    """Launch and compare; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.launcher", description=__doc__.splitlines()[0])
    parser.add_argument("--cc", type=int, default=90, help="Compute capability of the GPU, such as 90.")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--only", nargs="*", default=[], help="Launch the cases whose names begin so.")
    args = parser.parse_args()
    # before triton is imported
    os.environ.pop("TRITON_INTERPRET", None)
    import torch
    import triton

    from .launching import Machine

    wrong = count = compared = 0
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(args.cc, Path(folder))
        for name, make in _named(args.cc, getattr(torch, args.dtype)):
            if args.only and not name.startswith(tuple(args.only)):
                continue
            try:
                queued = make()
                if args.cc >= EARLY_FROM:
                    queued += [early for launch in queued if (early := launch.chained()) is not launch]
                compared += sum(map(machine.launch, queued))
            except Exception as error:
                wrong += 1
                print(f"WRONG {name}: {type(error).__name__}: {error}", flush=True)
                continue
            count += len(queued)
            print(f"ok    {name}: {', '.join(launch.kernel.__name__ for launch in queued)}", flush=True)
    print(f"{count} launches, {compared} parameters, {wrong} cases wrong (Triton {triton.__version__}, sm_{args.cc})")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
