"""Two result files, or two commits of the committed results, side by side.

    python -m bench compare before.jsonl after.jsonl
    python -m bench compare 1f0c2e7 9ab34d1              lines of bench/results by the commit that they measured
    python -m bench compare before after --fail-above 3  exit 1 if anything became more than 3 % slower

A row is a figure that both sides have on the same GPU; the ratio is after / before, above 1 is slower. Differences
below the spread that either side itself shows are marked as noise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ._records import (
    RESULTS,
    WITHOUT_FIGURES,
    Line,
    RecordError,
    figure,
    key_of,
    measured,
    newest,
    read_folder,
    read_lines,
)

NOISE_PERCENT = 3.0


def side(text: str, folder: Path = RESULTS) -> dict[tuple, Line]:
    """The newest lines of a file, or of the commit whose hash begins with `text`."""
    path = Path(text)
    if path.is_file():
        lines = sorted(read_lines(path), key=lambda line: line.get("date", ""))
    else:
        lines = [line for line in read_folder(folder) if text and str(line.get("commit", "")).startswith(text)]
        if not lines:
            raise RecordError(f"{text} is neither a file nor a commit with lines in {folder}")
    return {key: line for key, line in newest(lines).items() if line["bench"] not in WITHOUT_FIGURES}


def noise_percent(line: Line) -> float:
    """How far two figures may differ by chance: the spread of the samples, at least 3 %."""
    middle, low, high = (line.get(name) for name in ("us", "p20", "p80"))
    if middle is None:
        middle = line.get("ms")
    if not middle or low is None or high is None:
        return NOISE_PERCENT
    return max(NOISE_PERCENT, 100 * (high - low) / middle)


def compare(before: dict[tuple, Line], after: dict[tuple, Line]) -> list[tuple[str, float | None, float | None, str]]:
    """(what, milliseconds before, after, verdict) of every figure that either side has, worst first."""
    rows = []
    for key in {**before, **after}:
        old, new = (figures.get(key) for figures in (before, after))
        a, b = (figure(line) if line else None for line in (old, new))
        if a is None or b is None:
            rows.append((_name(new or old), a, b, _absent(old, new)))
            continue
        percent = 100 * (b / a - 1)
        if abs(percent) <= max(noise_percent(old), noise_percent(new)):
            verdict = "same within noise"
        else:
            verdict = f"{abs(percent):.1f} % {'slower' if percent > 0 else 'faster'}"
        rows.append((_name(new), a, b, verdict))
    return sorted(rows, key=lambda row: -(row[2] / row[1] if row[1] and row[2] else 0.0))


def _absent(old: Line | None, new: Line | None) -> str:
    for which, line in (("before", old), ("after", new)):
        if line is None:
            return f"not measured {which}"
        if not measured(line):
            return f"{which}: {line.get('refused') or line.get('missing')}"
    return ""


def _name(line: Line) -> str:
    return " ".join(str(part) for part in key_of(line) if part is not None)


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def render(rows: Sequence[tuple[str, float | None, float | None, str]]) -> str:
    """A markdown table, and the geometric mean of the ratios."""
    lines = ["| figure | before ms | after ms | after / before | |", "|---|---:|---:|---:|---|"]
    ratios = []
    for name, a, b, verdict in rows:
        ratio = "-"
        if a is not None and b is not None:
            ratios.append(b / a)
            ratio = f"{b / a:.3f}"
        cells = (f"{x:.4g}" if x is not None else "-" for x in (a, b))
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio} | {verdict} |")
    mean = f"geometric mean of {len(ratios)} ratios: {geometric_mean(ratios):.3f}" if ratios else "nothing in common"
    return "\n".join([*lines, "", mean])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", help="Take this JSON lines file, or commit, as what was.")
    parser.add_argument("after", help="Take this one as what is.")
    parser.add_argument(
        "--fail-above", type=float, metavar="PERCENT", help="Exit with 1 if a figure is slower by more."
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="Look commits up in this folder.")
    args = parser.parse_args(argv)
    try:
        rows = compare(side(args.before, args.results), side(args.after, args.results))
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(render(rows))
    slower = [row for row in rows if row[1] and row[2] and row[3].endswith("slower")]
    worst = max((100 * (b / a - 1) for _, a, b, _ in slower), default=0.0)
    return 1 if args.fail_above is not None and worst > args.fail_above else 0


if __name__ == "__main__":
    sys.exit(main())
