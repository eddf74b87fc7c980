"""Caches of photographs' stand-ins in class folders, and exports of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


def read_mds(folder):
    """Samples of a folder of MDS shards, by the index alone."""
    index = json.loads((folder / "index.json").read_bytes())
    for shard in index["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        offsets = np.frombuffer(data, "<u4", shard["samples"] + 1, 4)
        assert np.frombuffer(data, "<u4", 1)[0] == shard["samples"]
        for start in offsets[:-1].tolist():
            sample = {}
            fixed = dict(zip(shard["column_names"], shard["column_sizes"], strict=True))
            free = [name for name, size in fixed.items() if size is None]
            sizes = fixed | dict(zip(free, np.frombuffer(data, "<u4", len(free), start).tolist(), strict=True))
            at = start + 4 * len(free)
            for name, encoding in zip(shard["column_names"], shard["column_encodings"], strict=True):
                raw, at = data[at : at + sizes[name]], at + sizes[name]
                kind, _, rest = encoding.partition(":")
                if kind == "ndarray":
                    dtype, shape = rest.split(":")
                    sample[name] = np.frombuffer(raw, dtype).reshape([int(n) for n in shape.split(",")])
                else:
                    decode = {"str": bytes.decode, "int": lambda b: int.from_bytes(b, "little"), "bytes": bytes}
                    sample[name] = decode[kind](raw)
            yield sample


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Nine rows of one size, with flips and posterior, in bfloat16."""
    return make_cache(tmp_path_factory.mktemp("one"), flip=True, posterior=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Nine rows of two sizes."""
    return make_cache(tmp_path_factory.mktemp("many"), area=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Rows of one size, latents alone, whose stems differ."""
    return make_cache(tmp_path_factory.mktemp("plain"), each=1, sizes=((48, 64),), dtype="fp32")


def deviation(cache, row, suffix=""):
    """sigma / std of a row in float64."""
    logsnr = row[f"logsnr{suffix}"].double()
    std = torch.tensor(LatentDataset(cache).plan.fields["whitening"]["std"]).double()
    return torch.sigmoid(-logsnr).sqrt() / std[:, None, None]


def unpatchified(latents):
    return F.pixel_shuffle(latents, 2)
