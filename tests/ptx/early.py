"""Launches that start early: that the wait stands in front of every access to global memory, in the compiled PTX."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from capacitor_kernels.launch import Launch
from capacitor_rt import ModelConfig
from capacitor_rt.runtime.executor import trace
from capacitor_rt.runtime.plan import PlanKey, make_plan

from .compiling import compile_launch

WAIT, RELEASE = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
_ACCESS = re.compile(r"\b(ld\.global|st\.global|cp\.async\.(ca|cg)|cp\.async\.bulk\.tensor|red\.|atom\.)")
_BRANCH = re.compile(r"^\s*(@!?%p\d+\s+)?bra", re.M)
_SMALL = ModelConfig(
    model_dim=64,
    encoder_depth=1,
    decoder_depth=1,
    decoder_start_blocks=1,
    decoder_end_blocks=0,
    bottleneck_dim=16,
)


def launches(cc: int, dependent: bool) -> list[Launch]:
    """Every kernel of an encoder and a decoder, once; one image's split products and sums of many tiles among them."""
    found: dict[str, Launch] = {}
    calls = (("encode", 64, "throughput"), ("decode", 1024, "throughput"), ("encode", 64, "latency"))
    for direction, size, use in calls:
        image = torch.uint8 if direction == "encode" else torch.float32
        key = PlanKey(direction, 1, size, size, torch.bfloat16, image, "nchw", cc, use)
        for _, queued in trace(make_plan(_SMALL, replace(key, dependent=dependent))):
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
    return "" if ptx.index(RELEASE) > wait else "the next launch may start before this one has waited"


def check(cc: int) -> Iterator[tuple[str, str]]:
    """(kernel, what is wrong) of all that start early; and one line for all that do not."""
    for launch in launches(cc, dependent=True):
        early = launch.options.get("launch_pdl", False)
        yield launch.kernel.__name__, problem(compile_launch(launch, cc).ptx) if early else "it does not start early"
    plain = [launch for launch in launches(cc, dependent=False) if not launch.kernel.__name__.startswith("project")]
    texts = [compile_launch(launch, cc).ptx for launch in plain]
    changed = [launch.kernel.__name__ for launch, ptx in zip(plain, texts, strict=True) if "griddepcontrol" in ptx]
    yield "launches that do not start early", f"{changed} wait" if changed else ""
