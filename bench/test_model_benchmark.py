"""Encode and decode end to end for pytest-benchmark: `pytest bench --benchmark-only`.

One call at a time, waited for; `python -m bench gpu` takes the figures that count. On the CPU a tiny model runs by the
torch backend and under Triton's interpreter.
"""

import functools

import pytest
import torch

from bench._contenders import EAGER, OURS, TINY, TINY_FLUX2, Setting, Shape
from bench._sides import make_inputs

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPES = (
    [Shape("encode", 128, 256), Shape("encode", 32, 512), Shape("encode", 1, 256), Shape("decode", 1, 1024)]
    if ON_GPU
    else [Shape("encode", 2, 64), Shape("decode", 1, 32)]
)


@functools.cache
def setting() -> Setting:
    return Setting(DEVICE, torch.bfloat16) if ON_GPU else Setting(DEVICE, torch.float32, TINY, TINY_FLUX2)


@pytest.mark.parametrize("contender", [OURS, EAGER], ids=["ours", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_model(benchmark, shape, contender):
    x = make_inputs(setting(), contender.model, shape)[0]
    run = contender.build(setting(), shape, x)
    benchmark.group = str(shape)

    def call():
        run(x)
        if ON_GPU:
            torch.cuda.synchronize()

    call()
    benchmark.pedantic(call, rounds=20 if ON_GPU else 1, iterations=1)
