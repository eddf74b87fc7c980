"""Launches that start early, in the compiled PTX: that the wait stands in front of every access to global memory, and
that the next launch is released behind the last product."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from capacitor_kernels.launch import Launch
from capacitor_rt import ModelConfig
from capacitor_rt.config import DicoConfig
from capacitor_rt.runtime.executor import trace
from capacitor_rt.runtime.plan import PlanKey, make_plan

from .compiling import compile_launch

WAIT, RELEASE = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
_ACCESS = re.compile(r"\b(ld\.global|st\.global|cp\.async\.(ca|cg)|cp\.async\.bulk\.tensor|red\.|atom\.)")
_PRODUCT = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_BRANCH = re.compile(r"^\s*(@!?%p\d+\s+)?bra", re.M)
_SMALL = ModelConfig(
    # loops of several steps, as those of the published models are: the product of a single one may move behind the
    # release; and a hidden layer that is wide enough for slices of K
    model_dim=256,
    encoder_depth=1,
    decoder_depth=1,
    decoder_start_blocks=1,
    decoder_end_blocks=0,
    bottleneck_dim=16,
)
_SIBLING = replace(_SMALL, encoder_depth=2, dico=DicoConfig("irdiffae_v1"))


def launches(cc: int, dependent: bool) -> list[Launch]:
    """Every kernel of an encoder and a decoder, once: sums of many tiles, one image's split products, blocks in e4m3,
    and those of models with channel attention among them."""
    found: dict[str, Launch] = {}
    calls = (
        (_SMALL, "encode", 64, "throughput", None),
        (_SMALL, "decode", 1024, "throughput", None),
        (_SMALL, "encode", 64, "latency", None),
        (_SMALL, "encode", 64, "latency", "fp8"),
        (_SIBLING, "encode", 64, "latency", None),
        (_SIBLING, "decode", 1024, "throughput", None),
    )
    for model, direction, size, use, precision in calls:
        image = torch.uint8 if direction == "encode" else torch.float32
        key = PlanKey(direction, 1, size, size, torch.bfloat16, image, "nchw", cc, use, precision=precision)
        for _, queued in trace(make_plan(model, replace(key, dependent=dependent))):
            for launch in queued:
                found.setdefault(launch.kernel.__name__, launch)
    return list(found.values())


def problem(ptx: str) -> str:
    """What is wrong with the PTX of a launch that starts early; empty where nothing is."""
    if ptx.count(WAIT) != 1 or ptx.count(RELEASE) != 1:
        return f"{ptx.count(WAIT)} waits and {ptx.count(RELEASE)} releases, expected one of each"
    wait, access, branch = ptx.index(WAIT), _ACCESS.search(ptx), _BRANCH.search(ptx)
    if access is None or access.start() < wait:
        return f"{access[0] if access else 'no access'} stands before the wait"
    if branch is not None and branch.start() < wait:
        return "a branch may pass the wait by"
    release, products = ptx.index(RELEASE), list(_PRODUCT.finditer(ptx))
    if release < wait:
        return "the next launch may start before this one has waited"
    # earlier, its programs would take registers and shared memory from the ones that still multiply
    return "a product stands behind the release" if products and products[-1].start() > release else ""


def check(cc: int) -> Iterator[tuple[str, str]]:
    """(kernel, what is wrong) of all that start early; and one line for all that do not."""
    for launch in launches(cc, dependent=True):
        early = launch.options.get("launch_pdl", False)
        yield launch.kernel.__name__, problem(compile_launch(launch, cc).ptx) if early else "it does not start early"
    plain = launches(cc, dependent=False)
    texts = [compile_launch(launch, cc).ptx for launch in plain]
    changed = [launch.kernel.__name__ for launch, ptx in zip(plain, texts, strict=True) if "griddepcontrol" in ptx]
    yield "launches that do not start early", f"{changed} wait" if changed else ""
