"""Result files as tables: the newest figures of every GPU, and Markdown rows of them.

A cell without data says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ._contenders import FLUX2_FORMS
from ._published import PUBLISHED, PUBLISHED_PSNR, PUBLISHED_SOURCE
from ._records import Line, key_of, measured, newest, on_gpu
from .model import BATCHES, NAMED, SIZES

NOTHING = "not measured yet"
COMMAND = "python -m bench gpu --out bench/results/NAME"
PSNR_COMMAND = (
    "capacitor-rt psnr IMAGES -m data-archetype/full_capacitor --against flux2 --json bench/results/psnr-NAME.json"
)
NOTHING_ON_A_GPU = f"Nothing has been measured on a GPU yet: `{COMMAND}` measures everything, in eight minutes."
# columns that README.md leaves to the page of all results
LONG = (
    "eager, ms",
    "compiled, ms",
    "FLUX.2, ms",
    "FLUX.2 as",
    "FLUX.2 eager, ms",
    "peak MiB",
    "published memory, % of FLUX.2's",
)
MODELLED_GPU = "RTX 5090"
"""That of the published figures."""
EXPECTED_NOTE = (
    "Modelled: predicted launch by launch from the compiled machine code, by `python -m bench sass`; expect a GPU to",
    "take up to a quarter longer. Other GPUs, sizes and the assumptions are in [model.md](bench/results/model.md).",
)
LOW_LATENCY = "ours, low_latency"
FACTS = {
    "torch": "torch",
    "triton": "Triton",
    "driver_version": "driver",
    "diffusers": "diffusers",
    "commit": "commit",
}


class Results:
    """The newest figures of every GPU."""

    def __init__(self, lines: Sequence[Line]):
        self.lines = on_gpu(lines)
        self.latest = newest(self.lines)
        self.gpus = sorted({line["gpu"] for line in self.lines})

    def of(self, bench: str, gpu: str) -> list[Line]:
        """Every newest line of one benchmark on one GPU."""
        return [line for line in self.latest.values() if line["bench"] == bench and line["gpu"] == gpu]

    def find(self, gpu: str, where: tuple[str, int, int], bench: str, model: str, variant: str) -> Line | None:
        """The line of one contender at (direction, batch, size), in bfloat16."""
        key = (bench, gpu, *where, model, variant, "bfloat16")
        return self.latest.get(key)

    def speedup(self, line: Line | None, over: str) -> str:
        """Of a line over another contender, from the newest run in which both were timed in turn."""
        if line is not None:
            key = key_of(line)
            for other in reversed(self.lines):
                if over in other.get("speedup_over", {}) and key_of(other) == key:
                    return f"{other['speedup_over'][over]:.2f}x"
        return NOTHING


def number(value: float | None, digits: int = 3) -> str:
    """A figure to so many significant digits, never in powers of ten."""
    if value is None:
        return NOTHING
    places = max(0, digits - 1 - _magnitude(value))
    return f"{value:.{places}f}"


def _magnitude(value: float) -> int:
    return int(f"{value:e}".rsplit("e", 1)[1])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; the first column is text."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def cell(line: Line | None, name: str = "ms") -> str:
    """A figure, or why there is none."""
    if line is None:
        return NOTHING
    if not measured(line):
        reason = "wrong result" if "refused" in line else line["missing"].split(":")[0]
        return f"none ({reason})"
    return number(line.get(name)) + (" (noisy)" if name == "ms" and line.get("noisy") else "")


def published_alone() -> list[str]:
    """The published figures, for where there are none to put beside them."""
    header = ["published", "ms", "FLUX.2, ms", "memory, % of FLUX.2's"]
    rows = []
    for name, (mine, theirs, share) in PUBLISHED.items():
        rows.append([name, f"{mine:.2f}", f"{theirs:.2f}" if theirs else "-", f"{share:.1f}" if share else "-"])
    return [*table(header, rows), "", f"Published: {PUBLISHED_SOURCE}."]


def modelled(path: Path, gpu: str) -> dict[str, tuple[str, str]]:
    """Milliseconds, and the floor by arithmetic, of each call on a GPU that `model.md` lists: "encode 128x256² fp8"."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    rows = re.findall(rf"^\| {gpu} \| ([^|]+) \| ([\d.]+) \|[^|]*\|[^|]*\| ([\d.]+) \|", text, re.M)
    return {call: (number(float(ms)), number(float(floor))) for call, ms, floor in rows}


def expected(folder: Path) -> list[str]:
    """What is published beside what is modelled, where nothing is measured; empty without a modelled page."""
    found = modelled(folder / "model.md", MODELLED_GPU)
    if not found:
        return []
    header = [f"{MODELLED_GPU}, ms", "FLUX.2's VAE, published", "full_capacitor in eager torch, published"]
    header += ["here, modelled", "here in fp8, modelled", "floor, computed"]
    rows = []
    for direction, batch, size, name in NAMED:
        mine, theirs, _ = PUBLISHED[name]
        call = f"{direction} {batch}x{size}²"
        ours, floor = found.get(call, ("-", "-"))
        fp8, _ = found.get(f"{call} fp8", ("-", "-"))
        rows.append([call, f"{theirs:.2f}" if theirs else "-", f"{mine:.2f}", f"**{ours}**", fp8, floor])
    return [*table(header, rows), "", f"Published: {PUBLISHED_SOURCE}.", *EXPECTED_NOTE]


def published_rows(results: Results, gpu: str, brief: bool = False) -> list[str]:
    """The rows of the published tables, on one GPU; `brief` for README.md. Single images also with low_latency."""
    rows = []
    for direction, batch, size, name in NAMED:
        where = (direction, batch, size)
        for variant in ("ours", LOW_LATENCY) if batch == 1 else ("ours",):
            what = f"{name}, low_latency" if variant == LOW_LATENCY else name
            cells = {"": what} | _cells(results, gpu, where, variant) | _published_cells(name)
            rows.append({k: v for k, v in cells.items() if k not in LONG} if brief else cells)
    return table(list(rows[0]), [list(row.values()) for row in rows])


def _cells(results: Results, gpu: str, where: tuple[str, int, int], variant: str) -> dict[str, str]:
    """What was measured at a row of the published tables."""
    ours, eager, *compiled = (
        results.find(gpu, where, "model", "full_capacitor", name)
        for name in (variant, "eager", "torch.compile", "torch.compile max-autotune")
    )
    beside = results.find(gpu, where, "flux2", "full_capacitor", variant)
    forms = {name: results.find(gpu, where, "flux2", "flux2", name) for name in FLUX2_FORMS}
    fastest, best = _faster(*compiled), _faster(*forms.values())
    return {
        "ours, ms": cell(ours),
        "eager, ms": cell(eager),
        "compiled, ms": cell(fastest),
        "FLUX.2, ms": cell(best),
        "FLUX.2 as": _form(forms, best),
        "FLUX.2 eager, ms": cell(forms["eager"]),
        "images/s": cell(ours, "images_per_s"),
        "x eager": results.speedup(ours, "full_capacitor/eager"),
        "x compiled": results.speedup(ours, f"full_capacitor/{fastest['variant']}" if fastest else ""),
        "x FLUX.2": results.speedup(beside, f"flux2/{best['variant']}" if best else ""),
        "x FLUX.2 eager": results.speedup(beside, "flux2/eager"),
        "peak MiB": _mebibytes(ours),
        "memory, % of FLUX.2's": _share(beside, forms["eager"]),
    }


def _published_cells(name: str) -> dict[str, str]:
    mine, theirs, share = PUBLISHED[name]
    return {
        "published, ms": f"{mine:.2f}",
        "published FLUX.2, ms": f"{theirs:.2f}" if theirs else "-",
        "published memory, % of FLUX.2's": f"{share:.1f}" if share else "-",
    }


def _form(forms: dict[str, Line | None], best: Line | None) -> str:
    """The fastest way to run FLUX.2, and the ways that it was not compared with."""
    if best is None or not measured(best):
        return NOTHING
    others = ", ".join(name for name, line in forms.items() if line is None or not measured(line))
    return f"{best['variant']} (without figures: {others})" if others else str(best["variant"])


def verdict(results: Results, gpu: str) -> str:
    """Whether the runtime's self-check, which a run begins with, agreed with plain torch on a GPU."""
    lines = results.of("correctness", gpu)
    if not lines:
        return f"Self-check: {NOTHING}."
    wrong = [f"{line['name']} in {line['dtype']} ({line['problem']})" for line in lines if not line["ok"]]
    if wrong:
        return f"**Wrong: {len(wrong)} of {len(lines)} checks disagree with plain torch: {'; '.join(wrong)}.**"
    return f"Self-check: all {len(lines)} launches and calls agree with plain torch."


def psnr_rows(folder: Path) -> list[str]:
    """The published PSNR, and what `capacitor-rt psnr --json` wrote to `psnr-*.json` of the same models."""
    header = ["PSNR, dB", "mean", "std", "median", "P5", "P95", "images"]
    rows = [[name, *(f"{value:.2f}" for value in values), "2000"] for name, values in PUBLISHED_PSNR.items()]
    for path in sorted(folder.glob("psnr-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document["models"] | ({"difference": document["delta"]} if document.get("delta") else {})
        for name, row in found.items():
            values = (row[column] for column in ("mean", "std", "median", "p5", "p95"))
            cells = (NOTHING if value is None else f"{value:.2f}" for value in values)
            rows.append([f"{name} ({path.stem.removeprefix('psnr-')})", *cells, str(row["count"])])
    if len(rows) > len(PUBLISHED_PSNR):
        return [*table(header, rows), "", f"Measured with `{PSNR_COMMAND}`."]
    return [*table(header, rows), "", f"Released weights: {NOTHING}; `{PSNR_COMMAND}` measures them."]


def _faster(*lines: Line | None) -> Line | None:
    with_figures = [line for line in lines if line and measured(line)]
    if with_figures:
        return min(with_figures, key=lambda line: line["ms"])
    return next((line for line in lines if line), None)


def _mebibytes(line: Line | None) -> str:
    return number(line["peak_bytes"] / 2**20) if line and "peak_bytes" in line else NOTHING


def _share(line: Line | None, other: Line | None) -> str:
    if not (line and other and "peak_bytes" in line and "peak_bytes" in other):
        return NOTHING
    return f"{100 * line['peak_bytes'] / other['peak_bytes']:.1f}"


def source(results: Results, gpu: str) -> str:
    """What a GPU's figures were measured with."""
    seen = [line for line in results.latest.values() if line["gpu"] == gpu]
    facts = {name: sorted({str(line[name]) for line in seen if line.get(name)}) for name in FACTS}
    parts = [f"{FACTS[name]} {', '.join(values)}" for name, values in facts.items() if values]
    peaks = [line for line in seen if line["bench"] == "ceilings"]
    if peaks:
        parts.append(f"ceilings {number(peaks[-1]['tflops'])} TFLOP/s and {number(peaks[-1]['gbps'])} GB/s")
    clock = sorted(line["clock_mhz"] for line in seen if "clock_mhz" in line)
    if clock:
        parts.append(f"SM clock {clock[0]} to {clock[-1]} MHz")
    busy = sorted({line["busy"] for line in seen if line.get("busy")})
    return "; ".join(parts) + "." + (f" Warning: {'; '.join(busy)}." if busy else "")


def sweep_rows(results: Results, gpu: str) -> list[str]:
    """Every size and batch of both directions."""
    header = ["", "ours ms", "eager ms", "FLUX.2 eager ms", "images/s", "% of floor", "peak MiB"]
    header += ["error", "eager's error"]
    rows = []
    for direction in ("encode", "decode"):
        for size in SIZES:
            for batch in BATCHES:
                where = (direction, batch, size)
                eager = results.find(gpu, where, "model", "full_capacitor", "eager")
                flux2 = results.find(gpu, where, "flux2", "flux2", "eager")
                for variant in ("ours", LOW_LATENCY) if batch == 1 else ("ours",):
                    ours = results.find(gpu, where, "model", "full_capacitor", variant)
                    errors = (f"{x['error']:.1e}" if x and "error" in x else NOTHING for x in (ours, eager))
                    rates = (cell(ours, "images_per_s"), cell(ours, "percent_of_floor"), _mebibytes(ours))
                    name = f"{direction} {batch}x{size}x{size}{', low_latency' if variant == LOW_LATENCY else ''}"
                    rows.append([name, cell(ours), cell(eager), cell(flux2), *rates, *errors])
    return table(header, rows)


def variant_rows(results: Results, gpu: str) -> list[str]:
    """Every contender at the published rows."""
    header = ["", "model", "as", "ms", "20 %", "80 %", "peak MiB", "device MiB", "error", "latency ms"]
    rows = []
    for line in results.latest.values():
        if line["bench"] in ("model", "flux2") and line["gpu"] == gpu and line.get("row"):
            device = number(line["device_bytes"] / 2**20) if "device_bytes" in line else NOTHING
            error = f"{line['error']:.1e}" if "error" in line else NOTHING
            latency = number(line["latency_ms"]) if "latency_ms" in line else "-"
            times = (cell(line), cell(line, "p20"), cell(line, "p80"))
            rows.append([line["row"], line["model"], line["variant"], *times, _mebibytes(line), device, error, latency])
    order = [name for *_, name in NAMED]
    rows.sort(key=lambda row: order.index(row[0]) if row[0] in order else len(order))
    return table(header, rows) if rows else [NOTHING]


def kernel_rows(results: Results, gpu: str) -> list[str]:
    """Every launch at every size."""
    header = ["", "images", "dtype", "us", "TFLOP/s", "GB/s", "% of floor", "x eager", "x compile"]
    rows = []
    for line in results.of("kernels", gpu):
        figures = [cell(line, name) for name in ("us", "tflops", "gbps", "percent_of_floor", "x_eager", "x_compile")]
        rows.append([line["op"], line["images"], line["dtype"], *figures])
    return table(header, rows) if rows else [NOTHING]


def cache_rows(results: Results, gpu: str) -> list[str]:
    """Throughput of the caching pipeline."""
    stages = ("decode", "fill", "encode", "write")
    header = ["", "images/s", "CPU ms per image", "of a plain loop", "workers", *stages, "limited by"]
    rows = []
    for line in results.of("cache", gpu):
        shares = [f"{line['occupancy'][stage]:.0%}" for stage in stages]
        what = f"JPEG {line['file_size']} to {line['size']}x{line['size']}, {line['images']} files"
        figures = [cell(line, "images_per_s"), cell(line, "cpu_ms"), cell(line["plain"], "cpu_ms")]
        rows.append([what, *figures, str(line["workers"]), *shares, line["limited_by"]])
    return table(header, rows) if rows else [NOTHING]


def compiled_rows(path: Path) -> list[str]:
    """Summary of `aot.md`: what the compiler makes of the shipped config rows, one line per compute capability."""
    if not path.is_file():
        return [NOTHING]
    found: dict[int, list[tuple[int, int, int]]] = {}
    for match in re.finditer(r"^\| (\d+) \|(?:[^|]*\|){6} (\d+) \| (\d+) \| (\d+) \|", path.read_text(), re.M):
        cc, *facts = map(int, match.groups())
        found.setdefault(cc, []).append(tuple(facts))
    header = ["", "kernels compiled", "most registers per thread", "bytes spilled", "most shared memory, bytes"]
    columns = {cc: list(zip(*facts, strict=True)) for cc, facts in found.items()}
    return table(
        header,
        [
            [f"sm_{cc}", str(len(registers)), str(max(registers)), str(sum(stack)), str(max(smem))]
            for cc, (registers, stack, smem) in sorted(columns.items())
        ],
    )
