"""Caches of photographs' stand-ins in class folders, and exports of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_cases import write_images
from models import random_model

from capacitor_rt.cache import CacheRequest, LatentDataset, cache_images
from capacitor_rt.cache.export import ExportReport, ExportRequest, export_cache
from capacitor_rt.cache.options import RunOptions
from capacitor_rt.cache.sources import ColumnsRequest

CLASSES = ("ant", "bee", "cat")
LABELS = {"ant": 0, "bee": 1, "cat": 2}


SIZES = ((48, 64), (20, 80), (40, 40))


def make_cache(
    folder: Path,
    *,
    each: int = 3,
    sizes=SIZES,
    distinct: bool = False,
    columns: ColumnsRequest | None = None,
    **request: Any,
) -> Path:
    """A cache of `each` images in every class folder under `folder/src`; the folder of the cache.

    Files of two classes have the same names unless they are to be `distinct`.
    """
    for n, name in enumerate(CLASSES):
        paths = write_images(folder / "src" / name, each, sizes=sizes[n:] + sizes[:n], suffix=".png" if n else ".webp")
        for path in paths if distinct else ():
            path.rename(path.with_name(f"{name}_{path.name}"))
    options = {"side": 64, "shard_rows": 4, **request}
    run = RunOptions(workers=0, progress=False, columns=columns or ColumnsRequest())
    cache_images(folder / "src", folder / "cache", random_model(), CacheRequest(**options), options=run)
    return folder / "cache"


def export(cache: Path, out: Path, format: str, **request: Any) -> ExportReport:
    return export_cache(cache, out, ExportRequest(format, **request), progress=False)


def rows_by_id(cache: Path) -> list[dict[str, Any]]:
    """Rows of a cache in the order of their ids, as `LatentDataset` gives them."""
    dataset = LatentDataset(cache)
    return sorted((dict(dataset[i]) for i in range(len(dataset))), key=lambda row: row["id"].encode())


def label_of(id: str) -> int:
    return LABELS[id.partition("/")[0]]
