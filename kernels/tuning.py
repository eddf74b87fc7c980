"""Launch parameters as data: frozen configs, JSON rows per compute capability, analytical defaults.

`lookup` answers with the row of exactly this shape, else with the row of the nearest shape within reach, else with the
family's analytical default, which follows from shared memory and register limits alone. It never measures
anything, so a first call costs nothing and can be captured in a CUDA graph. Rows that a user measured
(`user_rows`) come before shipped ones that are no nearer.

The module of an op defines its config dataclass and default and calls `register`; a family of launch parameters has
its op's name, and whoever asks for it imports that module. Rows live in `configs/sm_XX.json`, by family:

    {"compute_capability": 90, "families": {"expand": [
        {"shape": {"tokens_per_image": 256, "dim": 896, "hidden": 3584}, "dtype": "bf16", "use": "throughput",
         "config": {"block_m": 128, ...}, "evidence": {"kind": "compiled", "triton": "3.6.0"}}]}}

`use` keeps bits apart from speed: "throughput" rows depend on the shape of one image alone, so an image's
bits do not depend on the batch around it; "latency" rows are for one image at a time, chosen by the
caller.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache, lru_cache
from importlib import import_module, resources
from typing import Any

import torch

from . import OPS, user_rows
from .launch import cdiv, check_int32, compiler_options, dtype_name

Shape = Mapping[str, int]
USES = ("throughput", "latency")
COMPUTE_CAPABILITIES = (80, 89, 90, 100, 120)
# the nearest relative with at least as much shared memory
_RELATIVE = {86: 89, 87: 80, 101: 100, 103: 100, 110: 100, 121: 120}
# rows further away than this, in octaves summed over the near keys, lose to the analytical default. What suits one
# image at a time hangs on how few programs there are: of 1024 tokens' rows four times as many would be 20 % slower.
REACH_OCTAVES = {"throughput": 4.0, "latency": 1.0}
# one image at a time: tiles shrink, or K is cut into slices, until there is a program for each of some hundred SMs
LATENCY_PROGRAMS = 128
REGISTERS_PER_SM = 65536
SMEM_RESERVED_PER_CTA = 1024


@dataclass(frozen=True)
class Limits:
    """Shared memory of one compute capability, in bytes."""

    cc: int
    smem_per_cta: int
    smem_per_sm: int
    threads_per_sm: int


LIMITS: dict[int, Limits] = {
    80: Limits(80, 166912, 167936, 2048),
    89: Limits(89, 101376, 102400, 1536),
    90: Limits(90, 232448, 233472, 2048),
    100: Limits(100, 232448, 233472, 2048),
    120: Limits(120, 101376, 102400, 1536),
}


def base_cc(cc: int) -> int:
    """The compute capability whose rows and limits serve `cc`: itself, a relative, or the highest below."""
    if cc in LIMITS:
        return cc
    if cc in _RELATIVE:
        return _RELATIVE[cc]
    below = [known for known in LIMITS if known <= cc]
    if not below:
        raise ValueError(f"compute capability {cc} is below {min(LIMITS)}, the lowest supported one")
    return max(below)


def limits(cc: int) -> Limits:
    """Limits of `cc`, or of the relative that serves it."""
    return LIMITS[base_cc(cc)]


@dataclass(frozen=True)
class GemmConfig:
    """Tile and launch shape of a GEMM kernel.

    `tma` loads operands through host-made tensor descriptors (sm_90 and later). Of project alone: `split_k` > 1 sums
    that many slices of K in a second launch, in order; `transposed` multiplies the transposes, so that the weights
    instead of the activations go through registers. Of expand alone: `gluon` is the kernel of specialised warps.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    tma: bool = False
    split_k: int = 1
    transposed: bool = False
    gluon: bool = False

    def tile(self) -> dict[str, int]:
        """The kernel arguments that are the tile."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP_M": self.group_m}

    def options(self) -> dict[str, Any]:
        """Compiler options of a launch."""
        return compiler_options(self.num_warps, self.num_stages, self.maxnreg)


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
        forms: configs of other forms of the op, for who measures; not every GPU and shape has them.
    """

    name: str
    config: type
    exact: tuple[str, ...]
    near: tuple[str, ...]
    default: Callable[[int, Shape, torch.dtype, str], Any]
    accepts: Callable[[Any, Shape], bool] | None = None
    choose: Callable[[Any, int, Shape, torch.dtype, str], Any] | None = None
    forms: tuple[Any, ...] = ()


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
_forced: dict[str, tuple[Any, list[dict[str, int]]]] = {}
# compute capability -> rows in the place of the user's file; and who wants to know which of the user's rows answered
_kept: dict[int, tuple[ConfigRow, ...]] = {}
_watchers: list[list[ConfigRow]] = []
_generation = 0


def register(family: Family) -> Family:
    """Make a family known to `lookup`; a second family of the same name is refused."""
    if _FAMILIES.get(family.name, family) != family:
        raise ValueError(f"kernel family {family.name} is registered twice")
    _FAMILIES[family.name] = family
    _cached_lookup.cache_clear()
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


def lookup(family: str, cc: int, shape: Mapping[str, int], dtype: torch.dtype, use: str = "throughput") -> Any:
    """The config of `family` for a shape: exact row, else nearest row, else the analytical default.

    Args:
        cc: compute capability, e.g. 90.
        shape: the family's shape keys, e.g. {"tokens_per_image": 256, "dim": 896, "hidden": 3584}.
        dtype: dtype of the activations.
        use: "throughput" (bits independent of the batch) or "latency".

    Raises:
        ValueError: unknown family or use, or a shape that lacks one of the family's keys.
    """
    config, row = _cached_lookup(family, cc, tuple(sorted(shape.items())), dtype, use)
    choose = _FAMILIES[family].choose
    if choose is not None:
        config = choose(config, base_cc(cc), shape, dtype, use)
    if family in _forced:
        config, seen = _forced[family]
        seen.append(dict(shape))
    elif row is not None and row.path is not None:
        for watcher in _watchers:
            watcher.append(row)
    return config


@lru_cache(maxsize=4096)
def _cached_lookup(
    name: str, cc: int, items: tuple[tuple[str, int], ...], dtype: torch.dtype, use: str
) -> tuple[Any, ConfigRow | None]:
    family, shape = get_family(name), dict(items)
    if use not in USES:
        raise ValueError(f"use is {use!r}, expected one of {USES}")
    missing = [key for key in (*family.exact, *family.near) if key not in shape]
    if missing:
        raise ValueError(f"shape of {name} lacks {missing}: it has {sorted(shape)}")
    candidates = [
        row
        # of rows equally near the first counts
        for row in (*in_force(cc, name), *rows(base_cc(cc), name))
        if row.dtype == dtype_name(dtype)
        and row.use == use
        and all(row.shape[key] == shape[key] for key in family.exact)
        and (dict(row.shape) == shape or family.accepts is None or family.accepts(row.config, shape))
    ]
    if candidates:
        best = min(candidates, key=lambda row: _distance(family, row, shape))
        if _distance(family, best, shape) <= REACH_OCTAVES[use]:
            return best.config, best
    config = family.default(base_cc(cc), shape, dtype, use)
    if use == "latency" and config == family.default(base_cc(cc), shape, dtype, "throughput"):
        # one image of this size fills a GPU as well as many do
        return _cached_lookup(name, cc, items, dtype, "throughput")
    return config, None


@contextmanager
def using(family: str, config: Any) -> Iterator[list[dict[str, int]]]:
    """Answer every lookup of `family` with `config`; yields the list of shapes that were asked for.

    For measuring candidates and for tests; it holds for all threads of the process.
    """
    # a misspelt name would force nothing
    get_family(family)
    seen: list[dict[str, int]] = []
    before = _forced.get(family)
    _forced[family] = (config, seen)
    try:
        yield seen
    finally:
        if before is None:
            del _forced[family]
        else:
            _forced[family] = before


@contextmanager
def watching() -> Iterator[list[ConfigRow]]:
    """Collect the user's rows that lookups answer with, those of all threads of the process."""
    found: list[ConfigRow] = []
    _watchers.append(found)
    try:
        yield found
    finally:
        # by identity: two of them may hold the same rows
        _watchers[:] = [watcher for watcher in _watchers if watcher is not found]


@contextmanager
def keeping(cc: int, families: Mapping[str, Any]) -> Iterator[None]:
    """Let these rows be in force for `cc` in the place of the user's file, for all threads of the process.

    Args:
        families: rows by family, as in a config file; none for the shipped rows alone.

    Raises:
        UserRowsError: a row that no launch can have.
    """
    before = _kept.get(cc)
    _kept[cc] = _parse_user("a plan", cc, families)
    reload()
    try:
        yield
    finally:
        if before is None:
            del _kept[cc]
        else:
            _kept[cc] = before
        reload()


def reload() -> None:
    """Forget what was read of the user's files: the next lookup reads them again."""
    global _generation
    _generation += 1
    _user_rows.cache_clear()
    _cached_lookup.cache_clear()


def generation() -> int:
    """Grows whenever lookups may answer otherwise than before; for whoever remembers their answers."""
    return _generation


def in_force(cc: int, family: str | None = None) -> tuple[ConfigRow, ...]:
    """The user's rows for exactly this compute capability, of one family or of all.

    Raises:
        UserRowsError: the user's file is damaged.
    """
    found = _kept[cc] if cc in _kept else _user_rows(cc)
    return tuple(row for row in found if family in (None, row.family))


@cache
def _user_rows(cc: int) -> tuple[ConfigRow, ...]:
    path = user_rows.path_of(cc)
    return () if path is None else _parse_user(str(path), cc, user_rows.read(path, cc))


def _parse_user(where: str, cc: int, families: Mapping[str, Any]) -> tuple[ConfigRow, ...]:
    try:
        user_rows.checked({"compute_capability": cc, "families": families}, cc)
        parsed = [
            replace(_parse_row(get_family(name), cc, index, raw), path=where)
            for name, raws in families.items()
            for index, raw in enumerate(raws)
        ]
    except ValueError as error:
        raise user_rows.UserRowsError(where, str(error)) from None
    for row in parsed:
        itemsize = 4 if row.dtype == "fp32" else 2
        tile = [n for key, n in vars(row.config).items() if key.startswith(("block_", "cols", "strips_"))]
        gemm = isinstance(row.config, GemmConfig)
        if gemm and (min(tile) < 16 or gemm_smem(row.config, itemsize) > limits(cc).smem_per_cta):
            raise user_rows.UserRowsError(where, f"{row.family} at {dict(row.shape)} has a tile that no CTA can hold")
        if math.prod(sorted(tile)[-2:]) > 1 << 16:
            raise user_rows.UserRowsError(where, f"{row.family} at {dict(row.shape)} has a tile too large to compile")
    return tuple(parsed)


def _distance(family: Family, row: ConfigRow, shape: Shape) -> float:
    return sum(abs(math.log2(row.shape[key] / shape[key])) for key in family.near)


def rows(cc: int, family: str | None = None) -> tuple[ConfigRow, ...]:
    """Rows of the config file of `cc`, of one family or of all of the file's.

    Raises:
        ValueError: an unknown family, or a row that does not fit its family's config; the message names file and row.
    """
    document = _document(cc)
    names = (family,) if family is not None else config_families(cc)
    return tuple(
        _parse_row(get_family(name), cc, index, raw)
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


def _parse_row(family: Family, cc: int, index: int, raw: Mapping[str, Any]) -> ConfigRow:
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


def gemm_smem(config: GemmConfig, itemsize: int, buffers: int | None = None) -> int:
    """Bytes of shared memory that the operand stages of a GEMM take."""
    stages = config.num_stages - 1 if buffers is None else buffers
    return stages * (config.block_m + config.block_n) * config.block_k * itemsize


def pick_block_m(tokens_per_image: int, candidates: tuple[int, ...] = (128, 64, 32, 16)) -> int:
    """The largest row tile that pads an image by at most 15 % more than the least padding candidate does."""
    least = min(_padded(tokens_per_image, block) for block in candidates)
    return max(block for block in candidates if _padded(tokens_per_image, block) <= 1.15 * least)


def _padded(tokens_per_image: int, block: int) -> int:
    return cdiv(tokens_per_image, block) * block


def suits_image(config: GemmConfig, shape: Shape) -> bool:
    """Whether a row's tile pads images of this shape little enough; the `accepts` of GEMM families."""
    tokens_per_image = shape["tokens_per_image"]
    least = _padded(tokens_per_image, pick_block_m(tokens_per_image, (128, 64, 32)))
    return _padded(tokens_per_image, config.block_m) <= 1.15 * least


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def gemm_default(cc: int, tokens_per_image: int, n: int, k: int, dtype: torch.dtype) -> GemmConfig:
    """A GEMM config from the limits alone.

    Tiles of 128 columns where N has them; rows by least padding; the depth of the pipeline such that two
    CTAs share an SM, so that the epilogue of one hides under the products of the other. float32 products
    run on CUDA cores: small tiles.
    """
    top = 64 if dtype == torch.float32 else 128
    itemsize = torch.finfo(dtype).bits // 8
    # wgmma and tcgen05 take 64 rows at least; fewer rows than half of that are not worth the padding
    rows = (128, 64) if cc in (90, 100) and tokens_per_image > 32 else (128, 64, 32, 16)
    block_m = min(pick_block_m(tokens_per_image, rows), top)
    block_n = min(top, max(16, next_power_of_2(n)))
    # wgmma (sm_90) and tcgen05 (sm_100) hold a 128 x 128 tile in eight warps; the others do best with
    # four and a shallow k
    big = block_m * block_n >= 128 * 128
    block_k = 32 if (big and cc not in (90, 100)) or dtype == torch.float32 else 64
    block_k = min(block_k, max(16, next_power_of_2(k)))
    warps = 8 if big and cc in (90, 100) else 4
    stages = 2
    half = limits(cc).smem_per_sm // 2 - SMEM_RESERVED_PER_CTA
    while stages < 4:
        deeper = GemmConfig(block_m, block_n, block_k, 8, warps, stages + 1)
        if gemm_smem(deeper, itemsize, buffers=stages + 1) > half:
            break
        stages += 1
    return GemmConfig(block_m, block_n, block_k, group_m=8, num_warps=warps, num_stages=stages)


def flat_gemm_default(cc: int, tokens_per_image: int, n: int, k: int, dtype: torch.dtype, use: str) -> GemmConfig:
    """A GEMM config for kernels whose tiles may mix images, so that only the last tile of a batch is padded.

    One image at a time, where large tiles would leave SMs idle, gets tiles of 64 x 64.
    """
    config = gemm_default(cc, 1024, n, k, dtype)
    programs = cdiv(tokens_per_image, config.block_m) * cdiv(n, config.block_n)
    if use == "latency" and programs < LATENCY_PROGRAMS:
        block_m, block_n = min(config.block_m, 64), min(config.block_n, 64)
        return replace(config, block_m=block_m, block_n=block_n, num_warps=4, num_stages=3)
    return config


def flat_tiles(tokens: int, columns: int, config: GemmConfig) -> tuple[int, int]:
    """(row tiles, programs) of a kernel whose tiles may mix images; refuses counts that 32 bits do not hold."""
    check_int32("number of tokens", tokens + config.block_m)
    tiles_m = cdiv(tokens, config.block_m)
    programs = tiles_m * cdiv(columns, config.block_n)
    check_int32("number of tiles", programs)
    return tiles_m, programs
