"""Names and shapes of a checkpoint's tensors: what a file may hold, what it is read as, everything wrong with it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .config import MOST, ModelConfig
from .dico_schema import canonical_dico_names, sibling_of
from .errors import ConfigError
from .reference import STATISTICS, Autoencoder

Shape = tuple[int, ...]
PREFIXES = ("model.", "module.")
_PREFIXES = re.compile(rf"\A(?:{'|'.join(map(re.escape, PREFIXES))})+")
# the types that weights may have
FLOATS = ("F16", "BF16", "F32", "F64")
# tensors that a checkpoint may lack because their values follow from the architecture
DERIVED = ("decoder.time_embed.freqs",)


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name and shape there, and the model's tensor it was read as (None: left over)."""

    name: str
    shape: Shape
    dtype: str
    read_as: str | None
    read_shape: Shape | None

    @property
    def fits(self) -> bool:
        """Whether the model can hold it: of a type for weights, and of the right shape."""
        if self.read_as is None or self.read_shape is None or self.dtype not in FLOATS:
            return False
        return same_memory(self.read_as, self.shape, self.read_shape)


@dataclass
class Reading:
    """A checkpoint's header matched against the architecture."""

    config: ModelConfig
    has_statistics: bool
    entries: list[Entry] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Numbers of parameters of the encoder, of the decoder and in all, as the file has them; no buffers."""
        buffers = (*STATISTICS, *DERIVED)
        sizes = {e.read_as: math.prod(e.shape) for e in self.entries if e.read_as and e.read_as not in buffers}
        parts = {p: sum(n for name, n in sizes.items() if name.startswith(p)) for p in ("encoder", "decoder")}
        return {**parts, "total": sum(sizes.values())}


def expected_shapes(config: ModelConfig, has_statistics: bool) -> dict[str, Shape]:
    """Name and shape of every tensor of a model of this `config`."""
    shapes: dict[str, Shape] = {}
    # the blocks of a part are alike, so one of each is built, whatever their number
    depths = {f"{part}.": depth for part, depth in _stated_depths(config).items()}
    few = {part: min(depth, 1) for part, depth in depths.items()}
    start, end = few["decoder.start_blocks."], few["decoder.end_blocks."]
    one = dataclasses.replace(
        config,
        encoder_depth=few["encoder.blocks."],
        decoder_depth=start + min(config.decoder_middle_blocks, 1) + end,
        decoder_start_blocks=start,
        decoder_end_blocks=end,
    )
    with torch.device("meta"):
        model = Autoencoder(one)
    for name, t in model.state_dict().items():
        part = next((part for part in depths if name.startswith(part)), None)
        if part is None:
            shapes[name] = tuple(t.shape)
        elif name.startswith(f"{part}0."):
            rest = name.removeprefix(f"{part}0.")
            shapes |= {f"{part}{i}.{rest}": tuple(t.shape) for i in range(depths[part])}
    for name in STATISTICS:
        shapes.pop(name, None)
    if has_statistics:
        shapes |= dict.fromkeys(STATISTICS, (config.latent_channels,))
    return shapes


def _stated_depths(config: ModelConfig) -> dict[str, int]:
    """Number of the blocks in each list of them, by its name."""
    flat = config.dico is not None and config.dico.is_flat
    return {
        "encoder.blocks": config.encoder_depth,
        "decoder.adaln_deltas": config.decoder_depth,
        "decoder.start_blocks": config.decoder_start_blocks,
        "decoder.blocks" if flat else "decoder.middle_blocks": config.decoder_middle_blocks,
        "decoder.end_blocks": config.decoder_end_blocks,
    }


def same_memory(name: str, shape: Shape, expected: Shape) -> bool:
    """Whether a tensor of `shape` is, element by element, the one of shape `expected`.

    Dimensions of 1 do not matter (a 1x1 convolution is a linear); a patchify weight may have its patch flattened.
    """
    if "patchify.proj.weight" in name and shape:
        return shape[0] == expected[0] and math.prod(shape[1:]) == math.prod(expected[1:])
    return [n for n in shape if n != 1] == [n for n in expected if n != 1]


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """File name -> model name: prefixes are dropped, the top-level statistics pair is renamed."""
    stripped = {name: _PREFIXES.sub("", name) for name in names}
    for suffix, canonical in zip(("running_mean", "running_var"), STATISTICS, strict=True):
        found = [name for name, bare in stripped.items() if "." not in bare and bare.endswith(suffix)]
        if len(found) == 1:
            stripped[found[0]] = canonical
    return stripped


def read_layout(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, str], settings: dict[str, Any], source: str
) -> Reading:
    """Match a file's tensors with the architecture.

    Args:
        shapes, dtypes: of the file's tensors, by their names there.
        settings: the parsed `config.json`, empty where there is none. Shapes win over it, with a note.
        source: path shown in messages.

    Returns:
        The reading; its `problems` list every tensor that is missing or of an impossible shape.
    """
    names = canonical_names(shapes)
    by_model_name: dict[str, str] = {}
    problems = []
    for name, bare in names.items():
        if bare in by_model_name:
            problems.append(f"twice: {name!r} and {by_model_name[bare]!r} are both {bare}")
        by_model_name[bare] = name
    bare_shapes = {bare: tuple(shapes[name]) for bare, name in by_model_name.items()}
    sibling = sibling_of(bare_shapes)
    if sibling is not None:
        other_names, ambiguous = canonical_dico_names(bare_shapes, sibling)
        problems += ambiguous
        by_model_name = {other_names.get(bare, bare): name for bare, name in by_model_name.items()}
        bare_shapes = {other_names.get(bare, bare): shape for bare, shape in bare_shapes.items()}
    config, notes = infer_config(bare_shapes, settings, source, sibling)
    has_statistics = config.has_statistics or (sibling is None and any(name in bare_shapes for name in STATISTICS))
    reading = Reading(config, has_statistics, notes=notes, problems=problems)
    expected = expected_shapes(config, has_statistics)

    for bare, name in sorted(by_model_name.items()):
        shape = bare_shapes[bare]
        target = expected.get(bare)
        reading.entries.append(Entry(name, shape, dtypes[name], bare if target else None, target))
        if target is None:
            reading.leftovers.append(f"left over: {name} {list(shape)} belongs to no part of this architecture")
        elif not same_memory(bare, shape, target):
            reading.problems.append(f"misshaped: {name} is {list(shape)}, expected {list(target)}")
        elif dtypes[name] not in FLOATS:
            reading.problems.append(f"wrong type: {name} is stored as {dtypes[name]}, expected F16, BF16, F32 or F64")
    for bare in sorted(expected.keys() - by_model_name.keys()):
        if bare in DERIVED:
            reading.notes.append(f"{bare} is absent: computed")
        else:
            reading.missing.append(bare)
            reading.problems.append(f"missing: {bare} {list(expected[bare])}")
    return reading


def infer_config(
    shapes: Mapping[str, Shape], settings: dict[str, Any], source: str, sibling: str | None = None
) -> tuple[ModelConfig, list[str]]:
    """The configuration that the tensors have, and a note for each key where `config.json` says otherwise.

    `sibling` is the DiCo model that the tensors are of, which no key of a published `config.json` names.

    Widths are voted by all tensors that show them, so that one damaged tensor is reported as such. A number of blocks
    may grow against `config.json` but not shrink: fewer blocks are missing tensors.
    """
    notes = []
    stated_sibling = settings["dico"].get("sibling") if isinstance(settings.get("dico"), dict) else None
    if stated_sibling is not None and stated_sibling != sibling:
        notes.append(f"{source}: dico.sibling is {stated_sibling!r}, but the tensors are of {sibling or 'no sibling'}")
    if sibling is None:
        settings = {key: value for key, value in settings.items() if key != "dico"}
    base = ModelConfig.from_dict(settings, source=source, sibling=sibling)
    found = _widths(shapes, base) | _patches(shapes, base)
    found |= _bottleneck(shapes, found.get("bottleneck_dim", base.bottleneck_dim))
    found |= _depths(shapes, base, settings)
    has_encoder = _has_encoder(shapes)
    for key, value in found.items():
        stated = getattr(base, key)
        if key in settings and value != stated and not (key == "encoder_depth" and not has_encoder):
            notes.append(f"{source}: {key} is {stated}, but the tensors have {value}: using {value}")
    if not has_encoder:
        notes.append("no encoder.* tensors: a decoder-only model")
    try:
        return dataclasses.replace(base, **found), notes
    except ConfigError as error:
        return base, [*notes, f"the tensors' shapes fit no architecture of this family: {error}"]


def _has_encoder(shapes: Mapping[str, Shape]) -> bool:
    return any(name.startswith("encoder.") for name in shapes)


def _sizes(shapes: Mapping[str, Shape], pattern: str, axis: int, rank: int = 1) -> list[int]:
    """Size along `axis` of every tensor of at least `rank` dimensions whose name fits; zeros left out."""
    matching = (s for n, s in shapes.items() if len(s) >= rank and re.fullmatch(pattern, n))
    return [s[axis] for s in matching if s[axis]]


def _vote(values: list[int], current: int) -> int | None:
    """The commonest value, the current one where it is among several; None for no values."""
    counts = Counter(values)
    return max(counts, key=lambda v: (counts[v], v == current)) if counts else None


def _widths(shapes: Mapping[str, Shape], base: ModelConfig) -> dict[str, Any]:
    """Sizes that many tensors show."""
    shown = {
        "model_dim": (r".*\.(dwconv|conv1|patchify\.proj|latent_up|fuse_in|fuse_skip)\.bias", 0, 1),
        "depthwise_kernel_size": (r".*\.(dwconv|conv2)\.weight", -1, 4),
        "adaln_low_rank_rank": (r"decoder\.adaln_deltas\.[0-9]+\.down\.weight", 0, 1),
        "bottleneck_dim": (r"decoder\.latent_up\.weight", 1, 2),
    }
    found: dict[str, Any] = {}
    for key, where in shown.items():
        winner = _vote(_sizes(shapes, *where), getattr(base, key))
        if winner is not None:
            found[key] = winner
    dim = found.get("model_dim", base.model_dim)
    hidden = Counter(_sizes(shapes, r".*\.(pwconv1|mlp\.conv_in)\.bias", 0)).most_common(1)
    if hidden and (hidden[0][0] != base.hidden_dim or dim != base.model_dim):
        found["mlp_ratio"] = hidden[0][0] / dim
    return found


def _patches(shapes: Mapping[str, Shape], base: ModelConfig) -> dict[str, Any]:
    """Channels and side of an image patch, from the first weight that shows them."""
    found: dict[str, Any] = {}
    for name, shape in shapes.items():
        if not name.endswith("patchify.proj.weight"):
            continue
        if len(shape) == 4 and shape[2] == shape[3] > 1:
            found.setdefault("in_channels", shape[1])
            found.setdefault("patch_size", shape[2])
        elif len(shape) >= 2:
            found.setdefault("patch_size", math.isqrt(max(1, math.prod(shape[1:]) // base.in_channels)))
    return found


def _bottleneck(shapes: Mapping[str, Shape], z: int) -> dict[str, Any]:
    """Kind of posterior and side of a latent patch, for a bottleneck of `z` channels."""
    found: dict[str, Any] = {}
    for width in _sizes(shapes, r"encoder\.to_bottleneck\.bias", 0):
        if width in (z, 2 * z):
            found["bottleneck_posterior_kind"] = "deterministic" if width == z else "diagonal_gaussian"
    if any(name in shapes and math.prod(shapes[name]) == 4 * z for name in STATISTICS):
        found["latent_patch"] = 2
    return found


def _depths(shapes: Mapping[str, Shape], base: ModelConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of blocks, where `settings` do not state more of them."""

    def blocks(part: str) -> int:
        pattern = re.compile(rf"{re.escape(part)}\.(0|[1-9][0-9]{{0,3}})\.")
        indices = {int(m[1]) for n in shapes if (m := pattern.match(n))}
        # a block beyond what the file has tensors for is no block, and its tensors are left over
        return max((i for i in indices if i < min(len(shapes), MOST["decoder_depth"])), default=-1) + 1

    has_encoder = _has_encoder(shapes)
    found = {"encoder_depth": blocks("encoder.blocks") if has_encoder else 0}
    start, middle, end = (blocks(f"decoder.{part}_blocks") for part in ("start", "middle", "end"))
    if base.dico is not None and base.dico.is_flat:
        start, middle, end = 0, blocks("decoder.blocks"), 0
    if start + middle + end:
        found |= {"decoder_start_blocks": start, "decoder_end_blocks": end, "decoder_depth": start + middle + end}
    return {
        key: value
        for key, value in found.items()
        if key not in settings or value >= getattr(base, key) or (key == "encoder_depth" and not has_encoder)
    }
