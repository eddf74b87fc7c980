"""Result files, one JSON line per figure: written as it is measured, read by what it is a figure of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from capacitor_rt.runtime.forecast import Ceilings

RESULTS = Path(__file__).parent / "results"
Line = dict[str, Any]
# what a figure is of: two lines that agree in these measured the same thing
END_TO_END = ("bench", "gpu", "direction", "batch", "size", "model", "variant", "dtype")
KEYS = {
    "ceilings": ("bench", "gpu"),
    "correctness": ("bench", "gpu", "dtype", "name"),
    "tests": ("bench", "file", "which"),
    "kernels": ("bench", "gpu", "op", "images", "use", "dtype", "dim", "hidden"),
    "model": END_TO_END,
    "flux2": END_TO_END,
    "cache": ("bench", "gpu", "size", "file_size", "backend"),
}
WITHOUT_FIGURES = ("ceilings", "correctness", "tests")


class RecordError(ValueError):
    """A result file that cannot be read."""


def append_line(path: Path, line: Line) -> None:
    """Append one JSON line at once, so that an interrupted run keeps what it measured.

    A line that an ended process left half written is cut off first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        file.seek(0)
        before, _, last = file.read().rpartition(b"\n")
        text = json.dumps(line).encode() + b"\n"
        if last and _is_json(last):
            text = b"\n" + text
        elif last:
            file.truncate(len(before) + 1 if before else 0)
        file.write(text)


def _is_json(text: str | bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def default_results(device: torch.device, stem: str) -> Path:
    """bench/results/<stem>-<gpu>.jsonl, the GPU's name in lower case with dashes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return RESULTS / f"{stem}-{'-'.join(name.lower().split())}.jsonl"


def ceilings_line(ceilings: Ceilings, facts: dict[str, Any]) -> Line:
    """The JSON line of measured ceilings."""
    return {"bench": "ceilings", **asdict(ceilings), **facts}


def read_lines(path: Path) -> list[Line]:
    """The lines of one JSON lines file, in order, without a last one that was only half written.

    Raises:
        RecordError: a line is not a JSON object, or of no known benchmark.
    """
    found = []
    before, _, last = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    for number, text in enumerate([*before.splitlines(), *([last] if _is_json(last) else [])], 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise RecordError(f"{path}, line {number} is not JSON ({error}): remove it or measure again") from None
        if not isinstance(line, dict) or line.get("bench") not in KEYS:
            raise RecordError(f"{path}, line {number} is of no known benchmark: expected one of {', '.join(KEYS)}")
        found.append(line)
    return found


def read_folder(folder: Path = RESULTS) -> list[Line]:
    """The lines of every `*.jsonl` below a folder, by date."""
    lines = [line for path in sorted(folder.rglob("*.jsonl")) for line in read_lines(path)]
    return sorted(lines, key=lambda line: line.get("date", ""))


def key_of(line: Line) -> tuple[Any, ...]:
    """What a line is a measurement of."""
    return tuple(line.get(name) for name in KEYS[line["bench"]])


def on_gpu(lines: Iterable[Line]) -> list[Line]:
    """Lines measured on a GPU; CPU runs only test the benchmarks."""
    return [line for line in lines if line.get("gpu")]


def measured(line: Line) -> bool:
    """Whether a line holds figures, not a reason for their absence."""
    return not ("missing" in line or "refused" in line)


def newest(lines: Sequence[Line]) -> dict[tuple[Any, ...], Line]:
    """By key: the newest line with figures, or where there is none the newest that says why. `lines` are by date."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        key = key_of(line)
        if key not in found or measured(line) or not measured(found[key]):
            found[key] = line
    return found


def figure(line: Line) -> float | None:
    """The main figure of a line, smaller is better: milliseconds, or for a cache run milliseconds per image."""
    if not measured(line):
        return None
    if line["bench"] == "kernels":
        return line["us"] / 1e3
    if line["bench"] == "cache":
        return 1e3 / line["images_per_s"]
    return line.get("ms")
