"""The user's own configs by which calls are launched, as data for a plan that must compute the same bits later.

`capacitor-rt tune` may choose another tile for a launch, and sums in another order differ in their last bits. So a
cache records the user's rows that its encode calls are launched by, and takes them again when it goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import torch

from capacitor_kernels import config_rows, tuning
from capacitor_kernels.user_rows import UserRowsError

from ..config import ModelConfig
from ..errors import ConfigError, InputError
from .plan import PlanKey, make_plan

Families = dict[str, list[dict[str, Any]]]
"""Rows by family, as in a config file, without their evidence."""


def configs_in_force(
    config: ModelConfig,
    sizes: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    cc: int,
    directions: Iterable[str] = ("encode", "posterior"),
    precision: str | None = None,
) -> Families:
    """The user's rows that calls of a model are launched by; empty where shipped rows and defaults serve alone.

    Args:
        sizes: (height, width) of images, in pixels.
        dtype: of weights and activations.
        cc: compute capability of the GPU, e.g. 90.
        precision: "fp8" of an encoder in e4m3, else None.

    Raises:
        ConfigError: the user's file is damaged; the message names it and the way out.
    """
    with tuning.watching() as found:
        for height, width in sizes:
            for direction in directions:
                size = 1, height, width
                key = PlanKey(direction, *size, dtype, torch.uint8, "nchw", cc, precision=precision)
                # an architecture or a GPU without launches has none to choose
                with suppress(InputError, ValueError):
                    make_plan(config, key)
    rows: Families = {}
    for row in sorted(found, key=lambda row: (row.family, sorted(row.shape.items()), row.dtype, row.use)):
        line = _without_evidence(row)
        lines = rows.setdefault(row.family, [])
        if line not in lines:
            lines.append(line)
    return rows


def configs_digest(configs: Mapping[str, Any]) -> str | None:
    """SHA-256 (hex) of `configs_in_force`; None for no rows, so that plans without any are what they were."""
    if not configs:
        return None
    text = json.dumps(configs, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def keep_configs(configs: Mapping[str, Any], cc: int) -> Iterator[None]:
    """Launch by these rows of `configs_in_force`, whatever the user's file says now; with none, by the shipped alone.

    It holds for the whole process, and for models that have not run: `release()` one that has.

    Raises:
        ConfigError: rows that no launch can have.
    """
    try:
        with tuning.keeping(cc, configs):
            yield
    except UserRowsError as error:
        raise ConfigError(str(error)) from error


def row_document(row: config_rows.ConfigRow) -> dict[str, Any]:
    """A row as a config file has it."""
    return _without_evidence(row) | {"evidence": dict(row.evidence)}


def _without_evidence(row: config_rows.ConfigRow) -> dict[str, Any]:
    return {"shape": dict(row.shape), "dtype": row.dtype, "use": row.use, "config": asdict(row.config)}
