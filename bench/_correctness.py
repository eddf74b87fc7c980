"""The runtime's self-check, before anything is timed: every launch, and one encode and decode, against plain torch.

    python -m bench._correctness --out DIR             appends a line per check to DIR/correctness.jsonl

Exit code 1 when one disagrees; `capacitor-rt doctor --check` prints the same checks as a report.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Check as much as the time allows."""
    import torch

    from capacitor_rt.runtime.self_check import checks

    from ._records import append_line
    from ._timing import environment

    deadline = time.monotonic() + 60 * args.minutes
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    facts = environment(device)
    done, wrong, more = 0, [], ""
    for row in checks(device, dtype):
        line = {"bench": "correctness", "name": row.name, "dtype": str(dtype).removeprefix("torch.")}
        line |= {"error": row.error, "bound": row.bound, "ok": row.ok, "problem": row.problem}
        append_line(args.out / "correctness.jsonl", line | facts)
        figures = f"{row.error:.2e} of at most {row.bound:.2e}" if row.error is not None else ""
        print(f"{'ok' if row.ok else 'WRONG':5} {row.name:32} {figures}  {row.problem}".rstrip(), flush=True)
        done += 1
        if not row.ok:
            wrong.append(row.name)
        if time.monotonic() > deadline:
            more = "; no time for the rest"
            break
    says = f"{len(wrong)} of {done} checks disagree with plain torch: {', '.join(wrong)}"
    print((says if wrong else f"{done} checks agree with plain torch") + more)
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench._correctness", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="Append to correctness.jsonl in this folder.")
    parser.add_argument("--minutes", type=float, default=5.0, help="Begin no check after this time.")
    parser.add_argument("--dtype", help="Compute in this dtype; on a GPU it is bfloat16, on the CPU float32.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="Check there.")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        # before triton is imported, which happens in run()
        os.environ["TRITON_INTERPRET"] = "1"
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
