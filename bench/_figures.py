"""Figures of the results as SVG: rooflines, speed-ups, throughput over the batch, the published rows by commit.

One file per figure and GPU, `<figure>-<gpu>.svg`; a figure without data is not drawn. The same lines give the same
bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._records import Line, measured, newest

OURS = "#0b6e99"


def draw_all(lines: Sequence[Line], folder: Path) -> list[str]:
    """Draw what the lines of each GPU allow; the names of the files, none with a note where matplotlib is absent."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed: pip install '.[bench]'", file=sys.stderr)
        return []
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "capacitor-rt", "svg.fonttype": "none", "font.size": 9})
    figures: dict[str, Callable[[Any, list[Line]], bool]] = {
        "roofline": roofline,
        "speedup": speedup,
        "throughput": throughput,
        "history": history,
    }
    drawn = []
    for gpu in sorted({line["gpu"] for line in lines}):
        mine = [line for line in lines if line["gpu"] == gpu]
        for title, draw in figures.items():
            name = f"{title}-{'-'.join(gpu.lower().split())}.svg"
            if _draw(draw, mine, folder / name, gpu):
                drawn.append(name)
    return drawn


def _draw(draw: Callable[[Any, list[Line]], bool], lines: list[Line], path: Path, gpu: str) -> bool:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    if not draw(axes, lines):
        return False
    axes.set_title(f"{axes.get_title()} - {gpu}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    return True


def roofline(axes: Any, lines: list[Line]) -> bool:
    """Every launch by arithmetic intensity under the ceilings of its own run."""
    launches = [x for x in newest(lines).values() if x["bench"] == "kernels" and measured(x) and x["flops"]]
    if not launches:
        return False
    tflops, gbps = launches[-1]["ceilings"]
    found = {line["op"]: [] for line in launches}
    for line in launches:
        found[line["op"]].append((line["flops"] / line["bytes"], line["tflops"]))
    every = [intensity for points in found.values() for intensity, _ in points]
    low, high = min(every) / 2, max(*every, 2e3 * tflops / gbps)
    roof = [(x, min(tflops, x * gbps / 1e3)) for x in (low, 1e3 * tflops / gbps, high)]
    axes.plot(*zip(*roof, strict=True), "k-", lw=1)
    for op, points in found.items():
        axes.plot(*zip(*points, strict=True), "o", ms=4, label=op)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title="Launches")
    axes.legend(fontsize=7, ncols=3)
    return True


def speedup(axes: Any, lines: list[Line]) -> bool:
    """Time of every other way to run a published row, in units of ours."""
    bars: dict[str, float] = {}
    for line in lines:
        if line["bench"] in ("model", "flux2") and line["variant"] == "ours" and line["row"] and measured(line):
            rest = {other: ratio for other, ratio in line["speedup_over"].items() if "/ours" not in other}
            bars |= {f"{line['row']}\n{other}": ratio for other, ratio in rest.items()}
    if not bars:
        return False
    axes.figure.set_figheight(1.2 + 0.22 * len(bars))
    axes.bar_label(axes.barh(list(bars), list(bars.values()), color=OURS), fmt="%.2f", fontsize=6, padding=2)
    axes.axvline(1, color="k", lw=0.8)
    axes.tick_params(axis="y", labelsize=5)
    axes.invert_yaxis()
    axes.set(xlabel="times as long as ours", title="Speed-up")
    return True


def throughput(axes: Any, lines: list[Line]) -> bool:
    """Megapixels per second over the batch, encode, ours and FLUX.2's."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in newest(lines).values():
        contender = (line["bench"], line.get("model"), line.get("variant"))
        if contender not in (("model", "full_capacitor", "ours"), ("flux2", "flux2", "eager")):
            continue
        if line["direction"] == "encode" and measured(line):
            name = f"{'ours' if line['bench'] == 'model' else 'FLUX.2'} {line['size']}x{line['size']}"
            series.setdefault(name, []).append((line["batch"], line["images_per_s"] * line["size"] ** 2 / 1e6))
    if not series:
        return False
    for name, points in sorted(series.items()):
        ours = name.startswith("ours")
        axes.plot(*zip(*sorted(points), strict=True), "o-" if ours else "s--", ms=3, lw=1, label=name)
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="megapixels/s", title="Encode throughput")
    axes.legend(fontsize=7, ncols=2)
    return True


def history(axes: Any, lines: list[Line]) -> bool:
    """Milliseconds of the published rows over the commits that measured them."""
    series: dict[str, dict[str, float]] = {}
    commits: dict[str, None] = {}
    for line in sorted(lines, key=lambda line: line.get("date", "")):
        if line["bench"] == "model" and line["variant"] == "ours" and line["row"] and measured(line):
            commits[line["commit"][:7]] = None
            series.setdefault(line["row"], {})[line["commit"][:7]] = line["ms"]
    if len(commits) < 2:
        return False
    order = list(commits)
    for name, points in series.items():
        axes.plot([order.index(c) for c in points], list(points.values()), "o-", ms=3, lw=1, label=name)
    axes.set_xticks(range(len(order)), order, rotation=45)
    axes.set(yscale="log", ylabel="ms", title="Published rows by commit")
    axes.legend(fontsize=7)
    return True
