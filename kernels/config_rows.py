"""Config rows: the families of launch parameters, and the rows of JSON files, shipped and of a user.

The module of an op defines its config dataclass and default and calls `register`; a family of launch parameters has
its op's name, and asking for it imports that module. Rows live in `configs/sm_XX.json`, by family:

    {"compute_capability": 90, "families": {"expand": [
        {"shape": {"tokens_per_image": 256, "dim": 896, "hidden": 3584}, "dtype": "bf16", "use": "throughput",
         "config": {"block_m": 128, ...}, "evidence": {"kind": "compiled", "triton": "3.6.0"}}]}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from importlib import import_module, resources
from typing import Any

import torch

from . import OPS, user_rows
from .gemm import GemmConfig, gemm_smem, product_bits
from .gpu_limits import limits

Shape = Mapping[str, int]
USES = ("throughput", "latency")


@dataclass(frozen=True)
class Family:
    """Launch parameters of one op: their config type, how its rows match a shape, and its default.

    Attributes:
        exact: shape keys that a row must share with the request.
        near: shape keys by which the closest row wins, compared by ratio.
        default: (compute capability, shape, dtype, use) -> config.
        accepts: (config of a row, requested shape) -> whether the row suits a shape that is not its own.
        choose: (config that was found, compute capability, shape, dtype, use) -> the one to take: for forms that are
            asked for, and for rows whose form this Triton lacks.
        bits: (config, compute capability, dtype) -> what decides the bits of an image beside the operands; two configs
            with equal ones, a bit class, leave the same. Without it every config is a class of its own.
        few: (config that was found, compute capability, shape, dtype, images) -> the one for so few images; it is taken
            where it is of the same bit class.
        forms: configs of other forms of the op, to be measured; not every GPU and shape has them.
    """

    name: str
    config: type
    exact: tuple[str, ...]
    near: tuple[str, ...]
    default: Callable[[int, Shape, torch.dtype, str], Any]
    accepts: Callable[[Any, Shape], bool] | None = None
    choose: Callable[[Any, int, Shape, torch.dtype, str], Any] | None = None
    bits: Callable[[Any, int, torch.dtype], Hashable] | None = None
    few: Callable[[Any, int, Shape, torch.dtype, int], Any] | None = None
    forms: tuple[Any, ...] = ()

    def same_bits(self, a: Any, b: Any, cc: int, dtype: torch.dtype) -> bool:
        """Whether two configs are of one bit class."""
        return a == b or (self.bits is not None and self.bits(a, cc, dtype) == self.bits(b, cc, dtype))


def flat_family(
    name: str,
    exact: tuple[str, ...],
    default: Callable[[int, Shape, torch.dtype, str], GemmConfig],
    accepts: Callable[[Any, Shape], bool] | None = None,
) -> Family:
    """The family of a GEMM whose tiles may mix images: few images take the default for as many tokens of one image."""

    def few(config: GemmConfig, cc: int, shape: Shape, dtype: torch.dtype, images: int) -> GemmConfig:
        tokens = {"tokens_per_image": images * shape["tokens_per_image"]}
        one = default(cc, {**shape, **tokens}, dtype, "latency")
        return config if one == default(cc, {**shape, **tokens}, dtype, "throughput") else one

    return Family(name, GemmConfig, exact, ("tokens_per_image",), default, accepts, bits=product_bits, few=few)


@dataclass(frozen=True)
class ConfigRow:
    """One line of a config file; `path` is that of a user's file."""

    family: str
    cc: int
    shape: Mapping[str, int]
    dtype: str
    use: str
    config: Any
    evidence: Mapping[str, Any]
    path: str | None = None


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known to `lookup`; a second family of the same name is refused."""
    if _FAMILIES.get(family.name, family) != family:
        raise ValueError(f"kernel family {family.name} is registered twice")
    _FAMILIES[family.name] = family
    return family


def get_family(name: str) -> Family:
    """The family of this name; imports the op that registers it.

    Raises:
        ValueError: no such family.
    """
    if name not in _FAMILIES and name in OPS:
        import_module(f".ops.{name}", __package__)
    if name not in _FAMILIES:
        known = sorted({*OPS, *_FAMILIES})
        raise ValueError(f"no kernel family {name!r}: import the module that registers it; known: {known}")
    return _FAMILIES[name]


def families() -> tuple[Family, ...]:
    """Every family, by name: those of all ops, and whatever else is registered."""
    return tuple(get_family(name) for name in sorted({*OPS, *_FAMILIES}))


def rows(cc: int, family: str | None = None) -> tuple[ConfigRow, ...]:
    """Rows of the config file of `cc`, of one family or of all of the file's.

    Raises:
        ValueError: an unknown family, or a row that does not fit its family's config; the message names file and row.
    """
    document = _document(cc)
    names = (family,) if family is not None else config_families(cc)
    return tuple(
        parse_row(get_family(name), cc, index, raw)
        for name in names
        for index, raw in enumerate(document.get("families", {}).get(name, ()))
    )


def config_families(cc: int) -> tuple[str, ...]:
    """Names of the families that have rows in the config file of `cc`."""
    return tuple(sorted(_document(cc).get("families", {})))


@cache
def _document(cc: int) -> dict[str, Any]:
    path = resources.files(__package__) / "configs" / f"sm_{cc}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def parse_row(family: Family, cc: int, index: int, raw: Mapping[str, Any]) -> ConfigRow:
    """A row of a file as it stands in JSON.

    Raises:
        ValueError: it does not fit its family's config; the message names file and row.
    """
    where = f"configs/sm_{cc}.json, {family.name}, row {index}"
    known = {f.name for f in fields(family.config)}
    unknown = sorted(set(raw["config"]) - known)
    if unknown:
        raise ValueError(f"{where}: unknown fields {unknown}, {family.config.__name__} has {sorted(known)}")
    keys = {*family.exact, *family.near}
    if set(raw["shape"]) != keys:
        raise ValueError(f"{where}: shape has {sorted(raw['shape'])}, expected {sorted(keys)}")
    use = raw.get("use", "throughput")
    if use not in USES:
        raise ValueError(f"{where}: use is {use!r}, expected one of {USES}")
    for field in fields(family.config):
        value = raw["config"].get(field.name, field.default)
        kinds = str(field.type).replace("None", "NoneType").split(" | ")
        if value is not MISSING and type(value).__name__ not in kinds:
            raise ValueError(f"{where}: {field.name} is {value!r}, expected {field.type}")
    try:
        config = family.config(**raw["config"])
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None
    return ConfigRow(family.name, cc, raw["shape"], raw["dtype"], use, config, raw.get("evidence", {}))


def parse_user_rows(where: str, cc: int, families: Mapping[str, Any]) -> tuple[ConfigRow, ...]:
    """Rows by family that a user measured; `where` is the file that they come from.

    Raises:
        UserRowsError: a row that no launch can have.
    """
    try:
        user_rows.checked({"compute_capability": cc, "families": families}, cc)
        parsed = [
            replace(parse_row(get_family(name), cc, index, raw), path=where)
            for name, raws in families.items()
            for index, raw in enumerate(raws)
        ]
    except ValueError as error:
        raise user_rows.UserRowsError(where, str(error)) from None
    for row in parsed:
        itemsize = {"fp32": 4, "e4m3": 1}.get(row.dtype, 2)
        tile = [n for key, n in vars(row.config).items() if key.startswith(("block_", "cols", "strips_"))]
        gemm = isinstance(row.config, GemmConfig)
        if gemm and (min(tile) < 16 or gemm_smem(row.config, itemsize) > limits(cc).smem_per_cta):
            raise user_rows.UserRowsError(where, f"{row.family} at {dict(row.shape)} has a tile that no CTA can hold")
        if math.prod(sorted(tile)[-2:]) > 1 << 16:
            raise user_rows.UserRowsError(where, f"{row.family} at {dict(row.shape)} has a tile too large to compile")
    return tuple(parsed)
