"""Every op beside eager torch for pytest-benchmark: `pytest bench --benchmark-only`.

One call at a time, so the host's overhead is part of the figure; `python -m bench gpu` takes the figures that count.
"""

import pytest
import torch

from bench._cases import GPU_IMAGES, TINY_IMAGES, make_case
from bench._contenders import TINY
from capacitor_kernels import OPS, compute_capability
from capacitor_rt import ModelConfig

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@pytest.mark.parametrize("provider", ["ours", "eager"])
@pytest.mark.parametrize("images", GPU_IMAGES if ON_GPU else TINY_IMAGES[:1], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark, op, images, provider):
    case = make_case(op, images, ModelConfig() if ON_GPU else TINY, DTYPE, compute_capability(DEVICE))
    prepared = case.prepare(DEVICE)
    benchmark.group = f"{op} {images}"

    def call():
        if provider == "ours":
            prepared.call()
        else:
            case.plain(*prepared.plain_args)
        if ON_GPU:
            torch.cuda.synchronize()

    call()
    benchmark.pedantic(call, rounds=20 if ON_GPU else 2, iterations=1)
