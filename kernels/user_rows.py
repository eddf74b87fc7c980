"""Config files of a user: rows that `capacitor-rt tune` measured here, which `lookup` prefers to the shipped ones.

They lie in the user's cache folder. CAPACITOR_CONFIGS names another folder, or is "shipped" for the shipped rows alone.
A file is of one compute capability and serves no other. Since it is data from outside, it is read in bounds, and every
value of it checked, before anything is compiled from it.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VARIABLE, SHIPPED = "CAPACITOR_CONFIGS", "shipped"
FILE_BYTES, MOST_ROWS = 1 << 20, 4096
ROW_KEYS = ("shape", "dtype", "use", "config", "evidence")
DTYPES, USES = ("bf16", "fp16", "fp32", "e4m3"), ("throughput", "latency")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
# what no launch can have would cost minutes to compile, or crash the compiler
_LEGAL: dict[str, Sequence[int]] = {
    "num_warps": (1, 2, 4, 8, 16, 32),
    "num_stages": range(1, 9),
    "maxnreg": range(16, 256),
    "split_k": range(1, 65),
    "strips_x": (1, 2, 4, 8, 16),
    "strips_y": (1, 2, 4, 8, 16),
}
_POWERS_OF_TWO = tuple(1 << n for n in range(11))
_MOST = 4096


class UserRowsError(ValueError):
    """A config file of the user that cannot be taken as it is; the message names the file and the way out."""

    def __init__(self, where: Path | str, problem: str):
        super().__init__(
            f"configs of yours, {where}: {problem}. Mend or delete it and run `capacitor-rt tune` again, or set "
            f"{VARIABLE}={SHIPPED} to do without"
        )


def folder() -> Path | None:
    """Where a user's config files are; None where there are to be none, or no home."""
    named = os.environ.get(VARIABLE)
    if named == SHIPPED:
        return None
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "capacitor_rt" / "configs"
    except RuntimeError:
        return None


def path_of(cc: int) -> Path | None:
    """The file of a compute capability, whether or not it is there."""
    inside = folder()
    return None if inside is None else inside / f"sm_{cc}.json"


def read(path: Path, cc: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of a file by family, every value checked; none where there is no file.

    Raises:
        UserRowsError: the file cannot be read, is of another compute capability, or holds what no row may.
    """
    try:
        # neither a pipe, which might never answer, nor a device
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserRowsError(path, "it is no regular file")
        with path.open("rb") as file:
            data = file.read(FILE_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserRowsError(path, f"it cannot be read ({error.strerror})") from error
    if len(data) > FILE_BYTES:
        raise UserRowsError(path, f"it is larger than {FILE_BYTES} bytes")
    try:
        document = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deep"
        raise UserRowsError(path, f"it is not valid JSON ({reason})") from None
    try:
        return checked(document, cc)
    except ValueError as error:
        raise UserRowsError(path, str(error)) from None


def checked(document: Any, cc: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of a document by family, every value checked.

    Raises:
        ValueError: what is wrong, and where.
    """
    if not isinstance(document, dict) or document.get("compute_capability") != cc:
        found = document.get("compute_capability") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"compute_capability is {_short(found)}, expected {cc}")
    families = document.get("families")
    if not isinstance(families, dict) or not all(isinstance(rows, list) for rows in families.values()):
        raise ValueError("families is no object of lists of rows")
    if sum(map(len, families.values())) > MOST_ROWS:
        raise ValueError(f"it has more than {MOST_ROWS} rows")
    for family, rows in families.items():
        for index, row in enumerate(rows):
            problem = _problem(row)
            if problem:
                raise ValueError(f"{_short(family)[1:-1]}, row {index}: {problem}")
    return families


def _problem(row: Any) -> str:
    """What is wrong with a row; empty where nothing is."""
    if not isinstance(row, dict) or not {"shape", "dtype", "config"} <= set(row) <= set(ROW_KEYS):
        return f"it is no object of {', '.join(ROW_KEYS)}"
    if row["dtype"] not in DTYPES or row.get("use", USES[0]) not in USES:
        return f"dtype is one of {', '.join(DTYPES)}, use one of {', '.join(USES)}"
    for part in ("shape", "config", "evidence"):
        values = row.get(part, {})
        if not isinstance(values, dict) or not all(_NAME.fullmatch(key) for key in values):
            return f"{part} is no object of names"
    for key, value in row["shape"].items():
        if type(value) is not int or not 1 <= value < 2**31:
            return f"{key} of the shape is {_short(value)}, expected a positive integer"
    for key, value in row["config"].items():
        if not legal(key, value):
            return f"{key} of the config is {_short(value)}, which no launch can have"
    for key, value in row.get("evidence", {}).items():
        if not isinstance(value, (int, float, type(None))) and not (isinstance(value, str) and len(value) <= 400):
            return f"{key} of the evidence is {_short(value)}"
    return ""


def legal(key: str, value: Any) -> bool:
    """Whether some launch can have this value of a config's field."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, str):
        return _NAME.fullmatch(value) is not None
    if type(value) is not int:
        return False
    if key.startswith("block_"):
        return value in _POWERS_OF_TWO
    return value in _LEGAL[key] if key in _LEGAL else 1 <= value <= _MOST


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write(path: Path, cc: int, families: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a config file, a row on a line, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    blocks = [
        f'  "{name}": [\n' + ",\n".join("   " + json.dumps(line) for line in lines) + "\n  ]"
        for name, lines in families.items()
        if lines
    ]
    text = f'{{\n "compute_capability": {cc},\n "families": {{\n' + ",\n".join(blocks) + "\n }\n}\n"
    checked(json.loads(text), cc)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def merge(
    families: Mapping[str, Sequence[dict[str, Any]]], family: str, row: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """The rows with one more, in place of the one of the same shape, dtype and use if there is one."""

    def identity(known: Mapping[str, Any]) -> tuple[Any, ...]:
        return dict(known["shape"]), known["dtype"], known.get("use", USES[0])

    kept = {name: list(rows) for name, rows in families.items()}
    rows = kept.setdefault(family, [])
    same = [i for i, known in enumerate(rows) if identity(known) == identity(row)]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)
    return kept
