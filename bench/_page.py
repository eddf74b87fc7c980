"""The results as a page that opens from disk: tables, launches under the roofline and in order, throughput, history.

What was measured comes from the result files. What is modelled, the plans at the ceilings of their GPUs and the table
of `python -m bench sass`, says that it is.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capacitor_rt.evaluation.view.folder import Staging
from capacitor_rt.evaluation.view.site import check_templates, write_site
from capacitor_rt.version import __version__

from . import _tables
from ._records import Line, measured, newest

if TYPE_CHECKING:
    from capacitor_rt.runtime.plan import LaunchPlan

HERE = Path(__file__).parent / "page"
SCRIPTS = ("dom.js", "charts.js", "timeline.js", "bench.js")
CALLS = (("encode", 128, 256), ("encode", 32, 512), ("encode", 1, 256), ("decode", 1, 1024), ("decode", 1, 2048))
GPUS = {"H200": 90, "RTX 5090": 120, "A100 80G": 80}
"""Those of the modelled times, with their compute capability."""
MODELLED = "from machine code (modelled)"
CURVES = {("model", "full_capacitor", "ours"): "ours", ("flux2", "flux2", "eager"): "FLUX.2"}


def write_page(results: _tables.Results, folder: Path, out: Path) -> Path:
    """Write the page of the results in `folder` to `out`; its first file.

    Raises:
        InputError: `out` holds something that is no page. MissingExtraError: Jinja2 is not installed.
    """
    check_templates()
    staging = Staging(out)
    try:
        write_site(
            staging.folder,
            "bench.html",
            SCRIPTS,
            page_data(results, folder),
            beside=HERE,
            title="capacitor_rt: speed",
            version=__version__,
            nothing=None if results.gpus else _tables.NOTHING_ON_A_GPU.replace("`", ""),
            gpus=[_tables_of(results, gpu) for gpu in results.gpus],
            published=cells(_tables.published_alone()),
            psnr=cells(_tables.psnr_rows(folder)),
            compiled=cells(_tables.compiled_rows(folder / "aot.md")),
        )
        staging.publish()
    finally:
        staging.discard()
    return staging.out / "index.html"


def cells(lines: Sequence[str]) -> list[list[str]]:
    """The rows of a Markdown table, the header first; empty where there is none."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|")]
    return [row for i, row in enumerate(rows) if i != 1]


def _tables_of(results: _tables.Results, gpu: str) -> dict[str, Any]:
    parts = (
        ("Published rows", _tables.published_rows),
        ("All ways to run them", _tables.variant_rows),
        ("Sizes and batches", _tables.sweep_rows),
        ("Launches", _tables.kernel_rows),
        ("Caching", _tables.cache_rows),
    )
    found = [(title, cells(rows(results, gpu))) for title, rows in parts]
    facts = [_tables.source(results, gpu), _tables.verdict(results, gpu).replace("**", "")]
    return {"name": gpu, "facts": facts, "tables": [(title, rows) for title, rows in found if rows]}


def page_data(results: _tables.Results, folder: Path) -> dict[str, Any]:
    """What the page's charts are drawn of, ready for JSON."""
    of_gpu = {gpu: [line for line in results.lines if line["gpu"] == gpu] for gpu in results.gpus}
    return {
        "rooflines": [found for gpu, lines in of_gpu.items() if (found := roofline(gpu, lines))],
        "throughput": [found for gpu, lines in of_gpu.items() for found in throughput(gpu, lines)],
        "history": [found for gpu, lines in of_gpu.items() if (found := history(gpu, lines))],
        "timelines": list(timelines(of_gpu, folder / "model.md")),
    }


def roofline(gpu: str, lines: Sequence[Line]) -> dict[str, Any] | None:
    """Every launch by FLOP per byte and TFLOP/s, and the ceilings of its run."""
    launches = [x for x in newest(lines).values() if x["bench"] == "kernels" and measured(x) and x["flops"]]
    if not launches:
        return None
    tflops, gbps = launches[-1]["ceilings"]
    points = [
        {
            "op": x["op"],
            "images": x["images"],
            "x": x["flops"] / x["bytes"],
            "y": x["tflops"],
            "percent": x["percent_of_floor"],
        }
        for x in launches
    ]
    return {"gpu": gpu, "tflops": tflops, "gbps": gbps, "points": points}


def throughput(gpu: str, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Megapixels per second over the batch by direction, a curve for each size of ours and of FLUX.2."""
    for direction in ("encode", "decode"):
        curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for line in newest(lines).values():
            name = CURVES.get((line["bench"], str(line.get("model")), str(line.get("variant"))))
            if name and line["direction"] == direction and measured(line):
                size = line["size"]
                curves[f"{name} {size}x{size}"].append((line["batch"], line["images_per_s"] * size**2 / 1e6))
        if curves:
            series = [{"name": name, "points": sorted(points)} for name, points in sorted(curves.items())]
            yield {"gpu": gpu, "direction": direction, "series": series}


def history(gpu: str, lines: Sequence[Line]) -> dict[str, Any] | None:
    """Milliseconds of the published rows over the commits that measured them; None before there are two."""
    series: dict[str, dict[str, float]] = {}
    commits: dict[str, None] = {}
    for line in lines:
        if line["bench"] == "model" and line["variant"] == "ours" and line["row"] and measured(line):
            commits[line["commit"][:7]] = None
            series.setdefault(line["row"], {})[line["commit"][:7]] = line["ms"]
    if len(commits) < 2:
        return None
    order = list(commits)
    curves = [
        {"name": name, "points": [(order.index(commit), ms) for commit, ms in points.items()]}
        for name, points in series.items()
    ]
    return {"gpu": gpu, "commits": order, "series": curves}


def timelines(of_gpu: Mapping[str, Sequence[Line]], modelled: Path) -> Iterator[dict[str, Any]]:
    """The launches of calls in their order, in microseconds: measured, modelled, and at the GPU's ceilings."""
    from capacitor_rt.runtime.forecast import CEILINGS

    predicted = modelled_launches(modelled)
    for direction, batch, size in CALLS:
        call = f"{direction} {batch}x{size}x{size}"
        for name, cc in GPUS.items():
            plan = _plan(direction, batch, size, cc)
            ops = [step.op for step in plan.steps]
            least = [1e3 * CEILINGS[cc].milliseconds(step)[0] for step in plan.steps]
            lanes = [_lane("every launch at its ceiling (modelled)", ops, least)]
            totals = predicted.get((f"{direction} {batch}x{size}²", name))
            if totals and set(ops) <= totals.keys():
                counts = Counter(ops)
                lanes.insert(0, _lane(MODELLED, ops, [totals[op] / counts[op] for op in ops]))
            for gpu, lines in of_gpu.items():
                times = _measured_launches(lines, f"{batch}x{size}x{size}")
                if name.split()[-1] in gpu and set(ops) <= times.keys():
                    lanes.insert(0, _lane(f"{gpu} (measured)", ops, [times[op] for op in ops]))
            work = [[step.flops, step.nbytes] for step in plan.steps]
            best = [CEILINGS[cc].tflops, CEILINGS[cc].gbps]
            yield {"call": call, "gpu": name, "lanes": lanes, "work": work, "ceilings": best}


def _lane(name: str, ops: Sequence[str], us: Sequence[float]) -> dict[str, Any]:
    return {"name": name, "ops": list(ops), "us": [round(t, 4) for t in us]}


def _measured_launches(lines: Sequence[Line], images: str) -> dict[str, float]:
    found = newest([x for x in lines if x["bench"] == "kernels" and x["images"] == images and x["dtype"] == "bfloat16"])
    return {x["op"]: x["us"] for x in found.values() if measured(x)}


def modelled_launches(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    """By call and GPU the microseconds of each op over the whole call, as `python -m bench sass` wrote them."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    if not path.is_file():
        return found
    for section in path.read_text(encoding="utf-8").split("\n## ")[1:]:
        title = re.match(r"(.+) on (.+): [\d.]+ ms\n", section)
        if title is None:
            continue
        header, *rows = cells(section.splitlines())
        totals = found.setdefault((title[1], title[2]), defaultdict(float))
        for row in rows:
            kernel, us = row[0], float(row[header.index("us each")])
            # one op may be several launches
            op = "grn" if kernel.startswith("grn_") else kernel
            totals[op] += us * int(row[header.index("n")])
    return found


def _plan(direction: str, batch: int, size: int, cc: int) -> LaunchPlan:
    import torch

    from capacitor_rt import FullCapacitorInferenceConfig, ModelConfig
    from capacitor_rt.runtime.plan import PlanKey, make_plan

    decoding = direction == "decode"
    image = torch.float32 if decoding else torch.uint8
    inference = FullCapacitorInferenceConfig() if decoding else None
    return make_plan(
        ModelConfig(), PlanKey(direction, batch, size, size, torch.bfloat16, image, "nchw", cc, inference=inference)
    )
