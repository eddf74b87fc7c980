"""The benchmarks, one command each.

    python -m bench COMMAND [OPTIONS]           python -m bench COMMAND --help says what it takes

Each is a module with `main(argv)`, so `python -m bench.COMMAND` runs it too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

RESULTS_PAGE = "bench/results/README.md"


@dataclass(frozen=True)
class Command:
    """A command: what it measures or does, and the table that its figures reach.

    Attributes:
        feeds: a page, or a page and the heading of one of its tables.
    """

    name: str
    does: str
    feeds: str

    @property
    def file(self) -> str:
        return f"bench/{self.name}.py"


COMMANDS = (
    Command("gpu", "everything that needs a GPU, in eight minutes", "README.md and all of " + RESULTS_PAGE),
    Command("kernels", "every launch against eager torch and torch.compile", f"{RESULTS_PAGE}: Launches"),
    Command("model", "encode and decode end to end", f"README.md; {RESULTS_PAGE}: Published rows, Sizes and batches"),
    Command("flux2", "the FLUX.2 VAE beside this model", f"README.md; {RESULTS_PAGE}: All ways to run them"),
    Command("cache", "JPEG files on disk to latents on disk", f"{RESULTS_PAGE}: Caching"),
    Command("reading", "opening a cache, and reading it with and without workers", "the terminal"),
    Command("scale", "many rows and huge images: memory over time, restarts", "the terminal"),
    Command("aot", "what the compiler makes of every config row, without a GPU", "bench/results/aot.md"),
    Command("sass", "what every launch should take by its machine code, without a GPU", "bench/results/model.md"),
    Command("compare", "two result files or commits side by side", "the terminal"),
    Command("report", "writes the tables from the result files, with --html a page", f"README.md, {RESULTS_PAGE}"),
)


def listing() -> str:
    """The table of commands, for a terminal."""
    rows = [("command", "file", "what it does", "feeds")]
    rows += [(c.name, c.file, c.does, c.feeds) for c in COMMANDS]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures this project. Figures are appended to bench/results, and tables are written from them.",
        epilog=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", choices=[c.name for c in COMMANDS], metavar="COMMAND", help="What to run: one of the table below."
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, help="Options of the command, which its own --help lists.")
    given = sys.argv[1:] if argv is None else list(argv)
    if not given:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(given)
    return import_module(f"bench.{args.command}").main(args.options)


if __name__ == "__main__":
    sys.exit(main())
