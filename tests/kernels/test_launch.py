"""Launch checks and jit helpers."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, guarded_input, guarded_output, randn

from capacitor_kernels import jit, launch, reference


@triton.jit
def _gelu_kernel(x_ptr, out_ptr, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, jit.gelu(x, KIND), mask=at < n)


@triton.jit
def _tiles_kernel(out_ptr, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    pid = tl.program_id(0)
    tile_m, tile_n = jit.grouped_tile(pid, tiles_m, tiles_n, GROUP_M)
    tl.store(out_ptr + 2 * pid, tile_m)
    tl.store(out_ptr + 2 * pid + 1, tile_n)


@pytest.mark.parametrize(("kind", "bound"), [("fit", 2.6e-5), ("erf", 1e-6)])
def test_gelu_stays_within_its_stated_error(kind, bound):
    x = torch.cat([torch.linspace(-14, 14, 4001), torch.tensor([-80.0, 80.0, 0.0])])
    out = guarded_output(len(x), dtype=torch.float32)
    _gelu_kernel[(1,)](guarded_input(x), out.tensor, len(x), kind, 4096)
    out.check()
    error = (out.tensor.double().cpu() - torch.nn.functional.gelu(x.double())).abs()
    assert error[x.abs() <= 14].max() < bound
    assert out.tensor[-1] == 0 and out.tensor[-2] == 80 and abs(out.tensor[-3]) < 1e-6


def test_reference_fit_is_the_kernels_fit():
    x = randn(512, seed=0, scale=4)
    out = guarded_output(512, dtype=torch.float32)
    _gelu_kernel[(1,)](guarded_input(x), out.tensor, 512, "fit", 512)
    torch.testing.assert_close(out.tensor.cpu(), reference.gelu_fit(x), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("tiles_m", "tiles_n", "group"), [(1, 1, 8), (7, 3, 4), (8, 5, 8), (9, 2, 8), (3, 6, 1)])
def test_grouped_tiles_cover_each_tile_once(tiles_m, tiles_n, group):
    out = torch.full((tiles_m * tiles_n, 2), -1, dtype=torch.int32, device=DEVICE)
    _tiles_kernel[(tiles_m * tiles_n,)](out, tiles_m, tiles_n, group)
    seen = {tuple(pair) for pair in out.tolist()}
    assert seen == {(m, n) for m in range(tiles_m) for n in range(tiles_n)}


def test_grouped_tiles_walk_a_group_column_by_column():
    out = torch.full((8, 2), -1, dtype=torch.int32, device=DEVICE)
    _tiles_kernel[(8,)](out, 4, 2, 2)
    assert out.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1], [2, 0], [3, 0], [2, 1], [3, 1]]


def _tensor(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


BAD = {
    "not a tensor": (lambda: [1.0], {}, TypeError, r"x is a list, expected a torch\.Tensor"),
    "dtype": (
        lambda: _tensor(4, dtype=torch.int64),
        {"dtypes": (torch.float32, torch.bfloat16)},
        TypeError,
        r"x is int64, expected fp32 or bf16: convert",
    ),
    "rank": (
        lambda: _tensor(4, 2),
        {"shape": (4,)},
        ValueError,
        r"x has shape \[4, 2\], expected 1 dimensions",
    ),
    "size": (
        lambda: _tensor(4, 2),
        {"shape": (None, 3)},
        ValueError,
        r"expected \[any, 3\]: dimension 1 is 2, not 3",
    ),
    "stride": (lambda: _tensor(4, 6).t(), {}, ValueError, r"strides \[1, 6\], expected row-major"),
    "alignment": (lambda: _tensor(9)[1:], {}, ValueError, r"4 bytes past a multiple of 16"),
    "device": (
        lambda: torch.zeros(4, device="meta"),
        {"like": _tensor(1)},
        ValueError,
        r"x is on meta, the other tensors on",
    ),
    "no gpu": (lambda: torch.zeros(4, device="meta"), {}, ValueError, r"run on an NVIDIA GPU, or on the CPU under"),
}


@pytest.mark.parametrize("case", BAD)
def test_check_tensor_names_what_is_wrong(case):
    make, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        launch.check_tensor("x", make(), **options)


def test_check_tensor_takes_what_fits():
    launch.check_tensor("x", _tensor(4, 8), shape=(None, 8), dtypes=torch.float32, like=_tensor(1))
    launch.check_tensor("x", _tensor(4, 8).t(), contiguous=False)


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        launch.check_tensor("x", torch.zeros(4))
    with pytest.raises(ValueError, match="no compute capability on cpu"):
        launch.compute_capability(torch.device("cpu"))


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"Tesla T4 has compute capability 7\.5.*8\.0 or later"):
        launch.compute_capability(torch.device("cuda:0"))


@pytest.mark.skipif(not launch.INTERPRETED, reason="reads the real GPU when there is one")
def test_interpreter_stands_in_for_a_chosen_gpu(monkeypatch):
    assert launch.compute_capability(torch.device("cpu")) == 90
    monkeypatch.setenv("CAPACITOR_INTERPRET_CC", "120")
    assert launch.compute_capability(torch.zeros(1)) == 120


@pytest.mark.parametrize(
    ("tokens", "per_image", "message"),
    [(10, 0, "tokens_per_image is 0"), (0, 4, "0 rows"), (10, 4, "10 rows, not a positive multiple of .* 4")],
)
def test_rows_must_be_whole_images(tokens, per_image, message):
    with pytest.raises(ValueError, match=message):
        launch.check_rows("y", tokens, per_image)


def test_int32_limit():
    launch.check_int32("count", 2**31 - 1)
    with pytest.raises(ValueError, match="count is 2147483648, over the 32-bit limit"):
        launch.check_int32("count", 2**31)


def test_descriptors_need_rows_of_16_bytes():
    launch.check_tma(True, w=_tensor(4, 8))
    launch.check_tma(False, w=_tensor(4, 7))
    with pytest.raises(ValueError, match=r"w has rows of 7 elements.*tma=False"):
        launch.check_tma(True, w=_tensor(4, 7))
