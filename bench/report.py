"""Result files to the tables of README.md and bench/results/README.md, and to figures.

    python -m bench report              write the tables, and figures where there are data (they need matplotlib)
    python -m bench report --check      exit 1 if a table is not what the result files say
    python -m bench report --html       write the page of them too: bench/results/page/index.html, or --html DIR

Every number comes from bench/results/*.jsonl, which `python -m bench gpu` writes on a GPU; a cell without data says so,
and where there is no data at all one line does. Published figures are those of the model cards, on the hardware that
they name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ._contenders import FLUX2_FORMS
from ._published import PUBLISHED_SOURCE
from ._records import RESULTS, RecordError, read_folder
from ._tables import (
    COMMAND,
    NOTHING_ON_A_GPU,
    Results,
    cache_rows,
    compiled_rows,
    expected,
    kernel_rows,
    psnr_rows,
    published_alone,
    published_rows,
    source,
    sweep_rows,
    variant_rows,
    verdict,
)

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
FORMS = (
    f"FLUX.2 is the fastest of its forms ({', '.join(FLUX2_FORMS)}) that were measured, named in the column "
    "`FLUX.2 as`; memory and the published figures are those of its eager form."
)


def summary(results: Results, folder: Path) -> str:
    """The block of README.md."""
    if not results.gpus:
        return "\n".join([*(expected(folder) or published_alone()), "", NOTHING_ON_A_GPU])
    parts = []
    for gpu in results.gpus:
        parts += [f"**{gpu}** (bfloat16; x is speed-up)", "", *published_rows(results, gpu, brief=True), ""]
        parts += [source(results, gpu), ""]
        if any(not line["ok"] for line in results.of("correctness", gpu)):
            parts += [verdict(results, gpu), ""]
    parts.append(
        f"Published: {PUBLISHED_SOURCE}. "
        f"Measured with `{COMMAND}`; compiled is the faster of `torch.compile` and its max-autotune mode; x FLUX.2 is "
        f"over the fastest of its forms ({', '.join(FLUX2_FORMS)}), x FLUX.2 eager over what the card measured. "
        "Memory, PSNR, every size, batch and launch: [bench/results](bench/results/README.md)."
    )
    return "\n".join(parts)


def page(results: Results, folder: Path, figures: Sequence[str]) -> str:
    """bench/results/README.md."""
    parts = ["# Results", "", f"Written by `python -m bench report` from the files that `{COMMAND}` leaves here.", ""]
    for gpu in results.gpus:
        parts += [f"## {gpu}", "", source(results, gpu), "", verdict(results, gpu), "", "### Published rows", ""]
        parts += [*published_rows(results, gpu), "", FORMS]
        for title, rows in (
            ("All ways to run them", variant_rows),
            ("Sizes and batches", sweep_rows),
            ("Launches", kernel_rows),
            ("Caching", cache_rows),
        ):
            parts += ["", f"### {title}", "", *rows(results, gpu)]
        parts.append("")
    if not results.gpus:
        parts += ["## On a GPU", "", NOTHING_ON_A_GPU, "", *published_alone(), ""]
    for name in figures:
        parts += [f"![{name.removesuffix('.svg')}]({name})", ""]
    parts += ["## Reconstruction", "", *psnr_rows(folder), ""]
    parts += ["## What the compiler makes of the shipped configs", ""]
    parts += ["Without a GPU; every row is in [aot.md](aot.md).", "", *compiled_rows(folder / "aot.md"), ""]
    return "\n".join(parts)


def replaced(text: str, block: str, name: str) -> str:
    """`text` with what is between the markers replaced.

    Raises:
        RecordError: a marker is absent, or they are in the wrong order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise RecordError(f"{name} has no place for the results: add the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Write nothing, and exit with 1 if a table is stale.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Read the *.jsonl files below this folder.")
    parser.add_argument(
        "--readme", type=Path, default=ROOT / "README.md", help="Write between the two markers of this page."
    )
    parser.add_argument(
        "--html", type=Path, nargs="?", const=RESULTS / "page", help="Write a page to this folder: bench/results/page."
    )
    args = parser.parse_args(argv)
    try:
        results = Results(read_folder(args.results))
        drawn = sorted(path.name for path in args.results.glob("*.svg"))
        if not args.check and results.gpus:
            from ._figures import draw_all

            drawn = sorted({*drawn, *draw_all(results.lines, args.results)})
        wanted = {args.results / "README.md": page(results, args.results, drawn)}
        if args.readme.is_file():
            text = args.readme.read_text(encoding="utf-8")
            wanted[args.readme] = replaced(text, summary(results, args.results), args.readme.name)
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        if args.check:
            print(f"{path.name} in {path.parent} is stale: run python -m bench report", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path}")
    if args.html and not args.check:
        return _write_html(results, args.results, args.html)
    return 1 if args.check and stale else 0


def _write_html(results: Results, folder: Path, out: Path) -> int:
    from capacitor_rt import CapacitorError

    from ._page import write_page

    try:
        print(f"wrote {write_page(results, folder, out)}")
    except CapacitorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
