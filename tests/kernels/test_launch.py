"""Launch checks, recording, and jit helpers."""

from __future__ import annotations

import threading

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, guarded_input, guarded_output, randn

from capacitor_kernels import dwconv_sumsq_shape, gpu_limits, jit, launch, reference, tuning
from capacitor_kernels.launch import recording, same_memory
from capacitor_kernels.ops.dwconv import dwconv
from capacitor_kernels.ops.fuse_skip import fuse_skip
from capacitor_kernels.ops.grn import GrnConfig, grn
from capacitor_kernels.ops.whiten import WhitenConfig, dewhiten, whiten


@triton.jit
def _gelu_kernel(x_ptr, out_ptr, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, jit.gelu(x, KIND), mask=at < n)


@triton.jit
def _tiles_kernel(out_ptr, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    pid = tl.program_id(0)
    pid_m, pid_n = jit.grouped_tile(pid, tiles_m, tiles_n, GROUP_M)
    tl.store(out_ptr + 2 * pid, pid_m)
    tl.store(out_ptr + 2 * pid + 1, pid_n)


@triton.jit
def _load_tile_kernel(x_ptr, out_ptr, n, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, jit.load_tile(x_ptr + at, at < n, EVEN))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_load_tile_is_zero_where_the_mask_is_and_ignores_it_in_even_tiles(dtype):
    x = guarded_input(torch.arange(1, 17), dtype)
    for even, expected in ((False, [*range(1, 6), *[0] * 11]), (True, list(range(1, 17)))):
        out = guarded_output(16, dtype=dtype)
        _load_tile_kernel[(1,)](x, out.tensor, 5, even, 16)
        out.check()
        assert out.tensor.tolist() == expected


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


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _latents(make=_meta) -> dict:
    return {"z": make(2, 5, 3, 4), "mean": make(5), "out": make(2, 5, 3, 4)}


def test_recorded_launches_keep_their_order_and_do_not_run():
    case = _latents(_tensor)
    case["out"].fill_(7.0)
    with recording() as launches:
        whiten(**case, rstd=_tensor(5))
        assert len(launches) == 1
        dewhiten(**case, std=_tensor(5))
    assert [launch.args["INVERSE"] for launch in launches] == [False, True]
    assert launches[0].args["z_ptr"] is case["z"] and launches[0].args["out_ptr"] is case["out"]
    assert (case["out"] == 7.0).all()
    dewhiten(**case, std=_tensor(5))
    assert len(launches) == 2 and (case["out"] == 0.0).all(), "launches run again after the recording"


def test_a_recorded_launch_is_the_one_that_runs():
    case = {name: guarded_input(randn(*t.shape, seed=i)) for i, (name, t) in enumerate(_latents(_tensor).items())}
    rstd = guarded_input(randn(5, seed=9))
    whiten(**case, rstd=rstd)
    expected = case["out"].clone()
    case["out"].zero_()
    with recording() as launches:
        whiten(**case, rstd=rstd)
    launch.run_launches(launches, DEVICE)
    assert torch.equal(case["out"], expected)


def test_meta_tensors_are_recorded_and_refused_elsewhere():
    partials, gamma, gain, norms = _meta(2, 9, 96), _meta(96), _meta(2, 96, dtype=torch.bfloat16), _meta(2, 96)
    split = GrnConfig(split=True, block_f=32, num_warps=2)
    with recording() as launches:
        grn(partials, gamma, gain, norms=norms, config=split)
    assert [launch.kernel.__name__ for launch in launches] == ["grn_norms_kernel", "grn_gain_kernel"]
    assert launches[0].grid == launches[1].grid == (2, 3)
    assert launches[1].options["num_warps"] == 2
    with pytest.raises(ValueError, match="partials is on meta: these kernels run on an NVIDIA GPU"):
        grn(partials, gamma, gain, norms=norms, config=split)


@pytest.mark.parametrize("cc", gpu_limits.COMPUTE_CAPABILITIES)
def test_configs_are_looked_up_for_the_recorded_compute_capability(cc):
    key = {"height": 16, "width": 16, "dim": 896}
    config = tuning.lookup("dwconv", cc, key, torch.bfloat16)
    x, y = _meta(256, 896, dtype=torch.bfloat16), _meta(256, 896, dtype=torch.bfloat16)
    sumsq = _meta(*dwconv_sumsq_shape(256, 896, config))
    with recording(cc) as launches:
        assert launch.compute_capability(x) == launch.compute_capability(DEVICE) == cc
        dwconv(x, _meta(49, 896), _meta(896), y, sumsq, batch=1, height=16, width=16)
    assert launches[0].options["num_warps"] == config.num_warps
    assert launches[0].args["COLS"] == config.cols and launches[0].args["BLOCK_C"] == config.block_c


def test_recordings_nest_and_end():
    before = launch.compute_capability(DEVICE)
    with recording(80) as outer:
        whiten(**_latents(), rstd=_meta(5))
        with recording(100) as inner:
            assert launch.compute_capability(DEVICE) == 100
            dewhiten(**_latents(), std=_meta(5))
            with recording():
                assert launch.compute_capability(DEVICE) == 100, "the one around it"
        assert launch.compute_capability(DEVICE) == 80
        whiten(**_latents(), rstd=_meta(5))
    assert [len(outer), len(inner)] == [2, 1]
    assert launch.compute_capability(DEVICE) == before


def test_a_recording_ends_with_an_error():
    with pytest.raises(RuntimeError, match="stop"), recording():
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="z is on meta"):
        whiten(**_latents(), rstd=_meta(5))


def test_a_recording_is_of_one_thread():
    refused, other = [], []

    def elsewhere():
        try:
            whiten(**_latents(), rstd=_meta(5))
        except ValueError as error:
            refused.append(str(error))
        with recording() as launches:
            whiten(**_latents(), rstd=_meta(5))
        other.extend(launches)

    with recording() as launches:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert launches == [] and len(other) == 1
    assert len(refused) == 1 and refused[0].startswith("z is on meta")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mean": _meta(4)}, ValueError, "mean has shape .* is 4, not 5"),
        ({"mean": _meta(5, dtype=torch.float16)}, TypeError, "mean is fp16, expected fp32"),
        ({"out": _meta(2, 5, 4, 3).mT}, ValueError, "out of shape .* expected row-major"),
        ({"out": _meta(121)[1:].view(2, 5, 3, 4)}, ValueError, "out starts at an address 4 bytes past"),
        ({"mean": _tensor(5)}, ValueError, "mean is on .*, the other tensors on meta"),
        ({"config": WhitenConfig(2**31, 16, 4)}, ValueError, "number of channels over all images is .*32-bit"),
    ],
    ids=["shape", "dtype", "stride", "alignment", "device", "int32"],
)
def test_every_other_check_holds_in_a_recording(change, error, message):
    with recording() as launches, pytest.raises(error, match=message):
        whiten(**_latents() | {"rstd": _meta(5)} | change)
    assert launches == []


def test_same_memory():
    for make in (_tensor, _meta):
        a = make(64)
        assert same_memory(a, a) and same_memory(a, a[:8]) and same_memory(a, a.view(8, 8))
        assert not same_memory(a, a[8:]) and not same_memory(a, make(64))


def test_outputs_over_inputs_are_refused_on_the_meta_device_too():
    s, m, w, b, out = _meta(8, 16), _meta(8, 16), _meta(32, 16), _meta(16), _meta(8, 16)
    with recording(90) as launches:
        fuse_skip(s, m, w, b, out, tokens_per_image=4)
        for name, target in (("s", s), ("m", m)):
            with pytest.raises(ValueError, match=f"out shares its memory with {name}"):
                fuse_skip(s, m, w, b, target, tokens_per_image=4)
    assert len(launches) == 1
