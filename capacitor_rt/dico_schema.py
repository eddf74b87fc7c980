"""Names of the DiCo siblings' tensors: which sibling a file is of, and the names that were never seen.

Parts of the published code could not be read, so some names are open: the attention, the projection, the gates, the
MLP, the list of a flat decoder's blocks, the mask feature. A tensor under another name is taken for what fits by place
and shape; what fits twice is a problem that lists the names.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping

Shape = tuple[int, ...]
_BLOCK = re.compile(r"(encoder\.blocks|decoder\.\w+)\.(0|[1-9][0-9]{0,3})\.(.+)")
_SEEN = re.compile(r"(encoder|decoder)\.\w+\.[0-9]+\.(conv1|conv2)\.(weight|bias)")
_FCDM = re.compile(r"(encoder|decoder)\.\w+\.[0-9]+\.(dwconv|pwconv1|pwconv2|grn)\.\w+")
_SKIP_LISTS = ("start_blocks", "middle_blocks", "end_blocks")
# modules of a block by the names that the model has
MODULES = ("conv1", "conv2", "conv3", "cca.proj", "mlp.conv_in", "mlp.conv_out")
GATES = ("gate_conv", "gate_mlp")
_SECOND = ("mlp", "ffn", "2")


def sibling_of(shapes: Mapping[str, Shape]) -> str | None:
    """Which sibling a file's tensors are of, by their names without prefixes; None for an FCDM model."""
    seen = sum(1 for name in shapes if _SEEN.fullmatch(name))
    if not seen or seen < sum(1 for name in shapes if _FCDM.fullmatch(name)):
        return None
    lists = {m[1] for name in shapes if (m := _BLOCK.fullmatch(name))}
    fused = any(name.startswith("decoder.fuse_skip.") for name in shapes)
    if not fused and not any(f"decoder.{part}" in lists for part in _SKIP_LISTS):
        return "mdiffae_v1"
    ends = ("encoder.norm_in.", "decoder.norm_in.", "decoder.latent_norm.", "decoder.norm_out.")
    return "irdiffae_v1" if any(name.startswith(ends) for name in shapes) else "mdiffae_v2"


def canonical_dico_names(shapes: Mapping[str, Shape], sibling: str) -> tuple[dict[str, str], list[str]]:
    """File name -> model name of a sibling's tensors that have another name, and what is ambiguous."""
    names = {name: name for name in shapes}
    problems: list[str] = []
    if sibling == "mdiffae_v1":
        _rename_flat_list(names, problems)
    if sibling != "mdiffae_v2":
        _rename_mask_feature(names, shapes, problems)
    blocks: dict[str, dict[str, str]] = defaultdict(dict)
    for name, read_as in names.items():
        m = _BLOCK.fullmatch(read_as)
        if m and m[1].removeprefix("decoder.") != "adaln_deltas":
            blocks[f"{m[1]}.{m[2]}."][m[3]] = name
    for prefix, found in blocks.items():
        if any(f"{module}.{part}" not in found for module in MODULES for part in ("weight", "bias")) or (
            prefix.startswith("encoder.") and not all(gate in found for gate in GATES)
        ):
            rest = {tail: shapes[name] for tail, name in found.items()}
            for tail, target in _block_names(prefix, rest, problems).items():
                names[found[tail]] = prefix + target
    return {name: read_as for name, read_as in names.items() if name != read_as}, problems


def _rename_flat_list(names: dict[str, str], problems: list[str]) -> None:
    """The one list of blocks of a flat decoder is `decoder.blocks`."""
    seen = {m[1] for name in names if (m := _BLOCK.fullmatch(name)) and m[3].startswith(("conv1.", "conv2."))}
    lists = sorted(n.removeprefix("decoder.") for n in seen if n.startswith("decoder."))
    if len(lists) > 1:
        problems.append(f"ambiguous: decoder.{', decoder.'.join(lists)} could all be the list decoder.blocks")
    elif lists and lists != ["blocks"]:
        old = f"decoder.{lists[0]}."
        for name in names:
            if name.startswith(old):
                names[name] = "decoder.blocks." + name.removeprefix(old)


def _rename_mask_feature(names: dict[str, str], shapes: Mapping[str, Shape], problems: list[str]) -> None:
    target = "decoder.mask_feature"
    if target in shapes:
        return
    fitting = [
        name
        for name, shape in shapes.items()
        if re.fullmatch(r"decoder\.\w*(mask|token)\w*", name) and shape and math.prod(shape) == max(shape)
    ]
    if len(fitting) == 1:
        names[fitting[0]] = target
    elif fitting:
        problems.append(f"ambiguous: {', '.join(sorted(fitting))} could each be {target}")


def _block_names(prefix: str, shapes: Mapping[str, Shape], problems: list[str]) -> dict[str, str]:
    """Tail -> model's tail, for the tensors of one block whose names are other ones."""
    width = next((shapes[n][0] for n in ("conv1.weight", "conv1.bias", "conv2.bias") if shapes.get(n)), 0)
    fits: dict[str, list[str]] = {module: [] for module in MODULES}
    for tail, shape in shapes.items():
        module, _, kind = tail.rpartition(".")
        if kind != "weight" or module in MODULES:
            continue
        sizes = [n for n in shape if n != 1]
        if sizes == [width, width]:
            fits["cca.proj" if "." in module else "conv3"].append(module)
        elif len(sizes) == 2 and sizes[1] == width:
            fits["mlp.conv_in"].append(module)
        elif len(sizes) == 2 and sizes[0] == width:
            fits["mlp.conv_out"].append(module)
    renamed: dict[str, str] = {}
    for target, modules in fits.items():
        if f"{target}.weight" in shapes:
            continue
        if len(modules) == 1:
            for kind in ("weight", "bias"):
                if f"{modules[0]}.{kind}" in shapes:
                    renamed[f"{modules[0]}.{kind}"] = f"{target}.{kind}"
        elif modules:
            listed = ", ".join(f"{prefix}{module}.weight" for module in sorted(modules))
            problems.append(f"ambiguous: {listed} could each be {prefix}{target}.weight")
    return renamed | _gate_names(prefix, shapes, width, problems)


def _gate_names(prefix: str, shapes: Mapping[str, Shape], width: int, problems: list[str]) -> dict[str, str]:
    """The encoder's two direct vectors; the one with mlp, ffn or 2 in its name is the second."""
    if not prefix.startswith("encoder.") or all(gate in shapes for gate in GATES):
        return {}
    vectors = sorted(tail for tail, shape in shapes.items() if "." not in tail and math.prod(shape) == width)
    second = [tail for tail in vectors if any(mark in tail.lower() for mark in _SECOND)]
    if len(vectors) == 2 and len(second) == 1:
        first = next(tail for tail in vectors if tail not in second)
        return {first: GATES[0], second[0]: GATES[1]}
    if len(vectors) > 1:
        listed = ", ".join(prefix + tail for tail in vectors)
        problems.append(f"ambiguous: {listed} could each be {prefix}{GATES[0]} or {prefix}{GATES[1]}")
    return {}
