"""The cases of `python -m bench.kernels` for pytest-benchmark: `pytest bench --benchmark-only`.

One call at a time, so launch overhead is part of the figure; for kernel times use `python -m bench.kernels`.
"""

import pytest
import torch

from bench._cases import GPU_SIZES, TINY_SIZES, builders

OPS = builders()
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@pytest.mark.parametrize("provider", ["kernel", "eager"])
@pytest.mark.parametrize("size", GPU_SIZES if ON_GPU else TINY_SIZES[:1], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_launch(benchmark, op, size, provider):
    case = OPS[op](size, DTYPE)
    prepared = case.prepare(DEVICE)
    benchmark.group = f"{op} {size}"

    def call():
        if provider == "kernel":
            prepared.launch()
        else:
            case.plain(*prepared.plain_args)
        if ON_GPU:
            torch.cuda.synchronize()

    call()
    benchmark.pedantic(call, rounds=20 if ON_GPU else 2, iterations=1)
