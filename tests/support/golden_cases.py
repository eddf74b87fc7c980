"""Golden models and their recorded inputs and outputs (tests/golden/README.md)."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from capacitor_rt.config import FullCapacitorInferenceConfig

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("p16", "p8")
SAMPLERS = {"ddim": "ddim", "dpmpp": "dpmpp_2m"}


@cache
def golden_io(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "io.safetensors")


def inference_of(key: str) -> FullCapacitorInferenceConfig:
    """The settings written in a tensor's name, `decode_{sampler}{steps}_{schedule}[_pdg{strength}]_seed{n}`."""
    m = re.fullmatch(r"decode_([a-z]+)(\d+)_([a-z]+)(?:_pdg([\d.]+))?_seed(\d+)", key)
    return FullCapacitorInferenceConfig(
        num_steps=int(m[2]),
        sampler=SAMPLERS[m[1]],
        schedule=m[3],
        pdg=m[4] is not None,
        pdg_strength=float(m[4] or 2.0),
        seed=int(m[5]),
    )


DECODES = [(name, key) for name in NAMES for key in sorted(golden_io(name)) if key.startswith("decode_")]
